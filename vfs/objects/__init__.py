"""Objects: named items with versions and metadata, in buckets, on any store. See `buckets.py` for what they do, and
`format.py` for how they are kept.

Used as a library, with no mount. Importing it asks nothing of anybody.
"""

from vfs.objects.buckets import Bucket, Objects
from vfs.objects.format import prefix_of
from vfs.objects.item import Item, Stats
from vfs.objects.offline import Waiting
from vfs.objects.places import Settled
from vfs.objects.query import Listing
from vfs.objects.transaction import Transaction

__all__ = ["Bucket", "Item", "Listing", "Objects", "Settled", "Stats", "Transaction", "Waiting", "prefix_of"]
