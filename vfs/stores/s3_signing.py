"""Signing of S3 requests (AWS Signature Version 4), for those that do not go through opendal.

Used by `s3_parts.py` and `s3_reads.py`. Nothing here blocks; the environment is read (AWS_*), never printed. See
https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

import functools
import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from vfs.stores.remote_config import Target

_ALGORITHM = "AWS4-HMAC-SHA256"
_EMPTY = hashlib.sha256(b"").hexdigest()
_UNSIGNED = "UNSIGNED-PAYLOAD"
# With these, requests have to carry more than a signature, or the credentials come from elsewhere: left to opendal.
_BEYOND_US = (
    "profile",
    "role_arn",
    "skip_signature",
    "allow_anonymous",
    "enable_virtual_host_style",
    "enable_request_payer",
    "server_side_encryption",
    "server_side_encryption_customer_algorithm",
    "default_acl",
    "default_storage_class",
    "checksum_algorithm",
)


@dataclass(frozen=True, slots=True)
class Signer:
    """Where a bucket is and who asks. Secrets are in it: never printed."""

    endpoint: str
    bucket: str
    region: str
    access_key: str
    secret_key: str
    token: str | None

    def __repr__(self) -> str:
        return f"Signer({self.endpoint}/{self.bucket})"

    def address(self, key: str, query: Mapping[str, str]) -> str:
        """The URL of an object (or of the bucket, for no key) with this query."""
        path = quote(
            f"{urlsplit(self.endpoint).path.rstrip('/')}/{self.bucket}" + (f"/{key}" if key else ""), safe="/~"
        )
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc}{path}?{_canonical_query(query)}"

    def headers(
        self, method: str, url: str, query: Mapping[str, str], body: bytes, extra: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The headers of a request, signed for this moment; `extra` go along and are signed, too."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        day = stamp[:8]
        parts = urlsplit(url)
        given = {
            "host": parts.netloc,
            "x-amz-content-sha256": self._said_of(body),
            "x-amz-date": stamp,
            **({"x-amz-security-token": self.token} if self.token else {}),
            **{name.lower(): value for name, value in (extra or {}).items()},
        }
        names = sorted(given)
        lines = [method, parts.path, _canonical_query(query), *(f"{name}:{given[name]}" for name in names), ""]
        signed = ";".join(names)
        request = "\n".join([*lines, signed, given["x-amz-content-sha256"]])
        scope = f"{day}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = "\n".join([_ALGORITHM, given["x-amz-date"], scope, digest])
        signature = hmac.digest(_signing_key(self.secret_key, day, self.region), text.encode(), "sha256").hex()
        credential = f"Credential={self.access_key}/{scope}"
        given["Authorization"] = f"{_ALGORITHM} {credential}, SignedHeaders={signed}, Signature={signature}"
        del given["host"]  # the client writes it
        return given

    def _said_of(self, body: bytes) -> str:
        """What the signature covers of a body: its digest. Where TLS guards it on its way, or it does not leave this
        machine, that is left out, as Amazon's own clients do: it would cost as much as the sending."""
        if not body:
            return _EMPTY
        return _UNSIGNED if self.guarded else hashlib.sha256(body).hexdigest()

    @property
    def guarded(self) -> bool:
        """Whether nobody on a network can change what is sent."""
        parts = urlsplit(self.endpoint)
        return parts.scheme == "https" or _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.lru_cache(maxsize=16)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def signer(target: Target) -> Signer | None:
    """A signer for a store, or None where its requests need more than we can give."""
    options = target.options
    if target.scheme != "s3" or any(options.get(each, "false") != "false" for each in _BEYOND_US):
        return None
    environment: Mapping[str, str] = {} if options.get("disable_config_load") == "true" else os.environ
    access_key = options.get("access_key_id") or environment.get("AWS_ACCESS_KEY_ID")
    secret_key = options.get("secret_access_key") or environment.get("AWS_SECRET_ACCESS_KEY")
    if not access_key or not secret_key:
        return None
    token = options.get("session_token") or (
        None if options.get("access_key_id") else environment.get("AWS_SESSION_TOKEN")
    )
    region = options.get("region", "us-east-1")
    given = options.get("endpoint") or environment.get("AWS_ENDPOINT_URL") or environment.get("AWS_ENDPOINT")
    endpoint = given or f"https://s3.{region}.amazonaws.com"
    endpoint = endpoint if "://" in endpoint else f"https://{endpoint}"
    return Signer(endpoint.rstrip("/"), options["bucket"], region, access_key, secret_key, token)


def _canonical_query(query: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='~')}={quote(query[name], safe='~')}" for name in sorted(query))
