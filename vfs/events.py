"""What happens, told to whoever subscribes: transfers with their progress, transactions, objects set and deleted.

Used by whatever moves or changes something (it publishes) and by what shows or follows it: `status`, the bars of the
command line, anybody who uses `vfs` as a library. Nothing here blocks but the subscribers: they are called one after
the other in the thread that publishes, so they hand long work on to a thread of their own.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from vfs.errors import in_words

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A transfer begins. `id` is in its later events, and in no other's. `what`: "push", "hydrate", "move", ...;
    `name`: the file or object as people see it; `size` in bytes. `about`: further names (`uuid`, `store`)."""

    id: int
    what: str
    name: str
    size: int
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stepped:
    """A transfer went on: `done` bytes of it are through by now."""

    id: int
    done: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A transfer is over. `error`: why it failed, in words; None when it did not."""

    id: int
    error: str | None


@dataclass(frozen=True, slots=True)
class TransactionBegan:
    """From here on changes are collected. `id` names the transaction; `notes` are its author's."""

    id: str
    notes: str


@dataclass(frozen=True, slots=True)
class TransactionEnded:
    """`committed`: its changes are all visible now, and their events follow; otherwise none is, and none follows."""

    id: str
    committed: bool


@dataclass(frozen=True, slots=True)
class ObjectSet:
    """An object was made or replaced. `store`: the store's name; `key`: where it is, as the store answered."""

    store: str
    key: str


@dataclass(frozen=True, slots=True)
class ObjectDeleted:
    """An object was deleted (or there was none: stores do not tell)."""

    store: str
    key: str


Event = Started | Stepped | Ended | TransactionBegan | TransactionEnded | ObjectSet | ObjectDeleted
Callback = Callable[[Event], object]

_ids = itertools.count(1)  # of the whole process: hubs may be mixed


@dataclass(eq=False, frozen=True, slots=True)
class _Hold:
    picks: Callable[[ObjectSet | ObjectDeleted], bool]
    events: list[Event] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Subscriber:
    callback: Callback
    kinds: tuple[type, ...]
    failed: bool = False

    def take(self, event: Event) -> None:
        try:
            self.callback(event)
        except Exception:  # whatever a subscriber does wrong is not the work's affair
            level, self.failed = (logging.DEBUG if self.failed else logging.ERROR), True
            log.log(level, "a subscriber failed on %s; later failures of it are logged as debug", event, exc_info=True)


class Events:
    """One hub. Any thread may publish and subscribe at any time, also from inside a subscriber."""

    def __init__(self) -> None:
        self._subscribers: tuple[_Subscriber, ...] = ()  # replaced, never changed: publishing takes no lock
        self._holds: tuple[_Hold, ...] = ()  # likewise
        self._lock = threading.Lock()

    def subscribe(self, callback: Callback, *kinds: type) -> Callable[[], None]:
        """Call `callback(event)` for events of these classes, of every class without one; gives the call that ends it.

        An event that is being published while the subscription ends may still arrive. What the callback raises is
        logged and disturbs nobody.
        """
        subscriber = _Subscriber(callback, kinds or (object,))
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(each for each in self._subscribers if each is not subscriber)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Tell everybody who subscribed to its class, in the order of subscription. Never raises an Exception."""
        if isinstance(event, ObjectSet | ObjectDeleted):
            for hold in self._holds:
                if hold.picks(event):
                    hold.events.append(event)
                    return
        for subscriber in self._subscribers:
            if isinstance(event, subscriber.kinds):
                subscriber.take(event)

    @contextmanager
    def holding(self, picks: Callable[[ObjectSet | ObjectDeleted], bool]) -> Iterator[list[Event]]:
        """Set and delete events that `picks` says yes to go into the list given, and to nobody else while the block
        runs; whoever holds them publishes them later. For transactions that outlive a block."""
        hold = _Hold(picks)
        with self._lock:
            self._holds = (*self._holds, hold)
        try:
            yield hold.events
        finally:
            with self._lock:
                self._holds = tuple(each for each in self._holds if each is not hold)

    @contextmanager
    def progress(self, what: str, name: str, size: int, **about: str) -> Iterator[Callable[[int], None]]:
        """Publish the events of one transfer; gives the function that tells how many bytes are done by now.

        `size` in bytes; the words are those of `Started`. What the block raises ends the transfer and goes on.
        """
        number = next(_ids)
        self.publish(Started(number, what, name, size, about))
        try:
            yield lambda done: self.publish(Stepped(number, done))
        except BaseException as error:
            self.publish(Ended(number, in_words(error) or type(error).__name__))
            raise
        self.publish(Ended(number, None))

    @contextmanager
    def transaction(self, id: str, notes: str = "") -> Iterator["Events"]:
        """Publish a transaction's begin and end; gives a hub for what happens in it.

        Set and delete events published there wait, and follow the end when the block ends; when it raises, the
        transaction is rolled back and they are forgotten. All other events go through at once.
        """
        held = _Held(self)
        self.publish(TransactionBegan(id, notes))
        try:
            yield held
        except BaseException:
            self.publish(TransactionEnded(id, False))
            raise
        self.publish(TransactionEnded(id, True))
        held.release()


class _Held(Events):
    """A hub in a transaction: its own subscribers hear at once, those of the outer one when it has ended."""

    def __init__(self, outer: Events) -> None:
        super().__init__()
        self._outer = outer
        self._waiting: list[Event] = []

    def publish(self, event: Event) -> None:
        super().publish(event)
        if isinstance(event, ObjectSet | ObjectDeleted):
            self._waiting.append(event)
        else:
            self._outer.publish(event)

    def release(self) -> None:
        for event in self._waiting:
            self._outer.publish(event)
