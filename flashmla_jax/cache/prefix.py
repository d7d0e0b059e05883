"""Which pages hold which tokens, so that a new prompt can take up what is cached already.

A full page is known by a hash of its tokens and of all tokens before them, so equal hashes mean
equal contents, and a prompt's longest known prefix is found page by page. The index is plain
Python on the host. It only keeps the books; the cache does what it says:

    pages, covered = index.match(prompt)            # cache.adopt: the sequence starts with these
    index.acquire(pages)                            # ... and uses them from now on
    retained = index.insert(tokens, pages)          # cache.retain: pages that were new to the index
    index.release(pages)                            # when the sequence ends: nobody's, still known
    evicted = index.evict(count)                    # cache.release: room for others

Sources: the prefix caches of vLLM (hashes of full pages) and SGLang (a tree, evicted leaf by leaf).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from flashmla_jax.cache.layout import PAGE_SIZE


@dataclasses.dataclass
class _Page:
    """A page that is known.

    Attributes:
      number: in the cache's pool.
      digest: of its tokens and all before.
      parent: the page before it, None for the first.
      inserted: which one it was to come into the index, for ties.
      last_used: when it was inserted, acquired or released.
      users: how often it is acquired.
      children: how many known pages continue it.
      pinned_children: how many of those are pinned. A page is pinned if it is used or one that
        continues it is, however far on: it cannot be evicted.
      queued: whether it has a place in the queue for eviction.
    """

    number: int
    digest: bytes
    parent: _Page | None
    inserted: int
    last_used: int
    users: int = 0
    children: int = 0
    pinned_children: int = 0
    queued: bool = False

    @property
    def is_pinned(self) -> bool:
        return self.users > 0 or self.pinned_children > 0


class PrefixIndex:
    """The full pages of a `PagedKVCache` whose contents are known, on the host."""

    def __init__(self, *, lookahead: int = 0) -> None:
        """An index that knows nothing.

        Args:
          lookahead: on how many tokens after it a page's contents depend; 1 if the cache has a
            layer for multi-token prediction.
        """
        self._lookahead = lookahead
        self._by_digest: dict[bytes, _Page] = {}
        self._by_number: dict[int, _Page] = {}
        self._num_pinned = 0
        self._clock = 0
        self._inserted = 0
        # Pages without users and children, and some that were: (last_used, inserted, page).
        self._queue: list[tuple[int, int, _Page]] = []

    def __len__(self) -> int:
        """How many pages are known."""
        return len(self._by_digest)

    def __contains__(self, page: int) -> bool:
        """Whether a page's contents are known."""
        return page in self._by_number

    @property
    def num_evictable(self) -> int:
        """How many pages `evict` could give: those neither used nor continued by one that is."""
        return len(self) - self._num_pinned

    def match(self, tokens: Sequence[int] | np.ndarray) -> tuple[list[int], int]:
        """Finds the longest prefix of a prompt that is cached.

        Changes nothing; who uses the pages says so with `acquire`.

        Args:
          tokens: the prompt. Its last token is never part of the prefix: it has to be read for
            there to be a prediction.

        Returns:
          The pages in order, and how many tokens they hold: `PAGE_SIZE` each.
        """
        pages = []
        num_pages = max(len(tokens) - max(self._lookahead, 1), 0) // PAGE_SIZE
        for digest in _digests(tokens, num_pages, self._lookahead):
            page = self._by_digest.get(digest)
            if page is None:
                break
            pages.append(page.number)
        return pages, len(pages) * PAGE_SIZE

    def insert(self, tokens: Sequence[int] | np.ndarray, pages: Sequence[int]) -> list[int]:
        """Makes the pages of a sequence known.

        Where the contents are known already, the page that held them first stays the one.

        Args:
          tokens: the sequence from its first token on, at least the `PAGE_SIZE * len(pages)` that
            the pages hold, and with a lookahead so many more.
          pages: its first full pages, in order.

        Returns:
          The pages that are new to the index and that the cache is to retain. Nobody uses them yet.

        Raises:
          ValueError: for too few tokens, or a page that the index knows with other contents; then
            nothing has changed.
        """
        if len(pages) and len(tokens) < len(pages) * PAGE_SIZE + self._lookahead:
            raise ValueError(
                f"tokens must fill the pages: {len(pages)} pages hold {len(pages) * PAGE_SIZE}, "
                f"got {len(tokens)} with a lookahead of {self._lookahead}"
            )
        digests = _digests(tokens, len(pages), self._lookahead)
        chain = list(zip(digests, map(int, pages), strict=True))
        new = [number for digest, number in chain if digest not in self._by_digest]
        for i, number in enumerate(new):
            if number in self._by_number or number in new[:i]:
                raise ValueError(f"pages has {number}, which holds other tokens")
        now = self._tick()
        parent = None
        for digest, number in chain:
            page = self._by_digest.get(digest)
            if page is None:
                page = _Page(number, digest, parent, self._inserted, now)
                self._inserted += 1
                self._by_digest[digest] = self._by_number[number] = page
                if parent is not None:
                    parent.children += 1
            page.last_used = now
            parent = page
        if parent is not None:
            self._queue_if_idle(parent)
        return new

    def acquire(self, pages: Sequence[int]) -> None:
        """Counts one more user of each page, which keeps it from being evicted.

        Args:
          pages: pages that the index knows, else a ValueError.
        """
        known = self._known(pages)
        now = self._tick()
        for page in known:
            page.last_used = now
            was_pinned = page.is_pinned
            page.users += 1
            if not was_pinned:
                self._pinned(page)

    def release(self, pages: Sequence[int]) -> None:
        """Takes back one `acquire` of each page.

        Args:
          pages: pages that are acquired, else a ValueError.
        """
        known = self._known(pages)
        for number, count in collections.Counter(pages).items():
            if self._by_number[number].users < count:
                raise ValueError(f"pages has {number}, which is not acquired that often")
        now = self._tick()
        for page in known:
            page.last_used = now
            page.users -= 1
            if not page.is_pinned:
                self._unpinned(page)
            self._queue_if_idle(page)

    def evict(self, count: int) -> list[int]:
        """Forgets pages that nobody uses, those that were not used for longest first.

        A page goes only after those that continue it, which could not be found without it.

        Args:
          count: how many, at most.

        Returns:
          The pages, which the cache is to release.
        """
        evicted: list[int] = []
        while len(evicted) < count and self._queue:
            last_used, _, page = heapq.heappop(self._queue)
            page.queued = False
            if page.users > 0 or page.children > 0:
                continue  # it comes back when it is idle again
            if page.last_used != last_used:
                self._queue_if_idle(page)
                continue
            del self._by_digest[page.digest], self._by_number[page.number]
            evicted.append(page.number)
            if page.parent is not None:
                page.parent.children -= 1
                self._queue_if_idle(page.parent)
        return evicted

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _known(self, pages: Sequence[int]) -> list[_Page]:
        for number in pages:
            if number not in self._by_number:
                raise ValueError(f"pages has {number}, which the index does not know")
        return [self._by_number[number] for number in pages]

    def _pinned(self, page: _Page) -> None:
        """Counts a page that has just become pinned, and those before it that thereby do."""
        self._num_pinned += 1
        while page.parent is not None:
            page = page.parent
            was_pinned = page.is_pinned
            page.pinned_children += 1
            if was_pinned:
                return
            self._num_pinned += 1

    def _unpinned(self, page: _Page) -> None:
        """The reverse."""
        self._num_pinned -= 1
        while page.parent is not None:
            page = page.parent
            page.pinned_children -= 1
            if page.is_pinned:
                return
            self._num_pinned -= 1

    def _queue_if_idle(self, page: _Page) -> None:
        if page.users == 0 and page.children == 0 and not page.queued:
            page.queued = True
            heapq.heappush(self._queue, (page.last_used, page.inserted, page))


def _digests(tokens: Sequence[int] | np.ndarray, num_pages: int, lookahead: int) -> Iterator[bytes]:
    """The hash of each of a sequence's first pages.

    It stands for all tokens up to the page's end, and so many after it.
    """
    ids = np.asarray(tokens[: num_pages * PAGE_SIZE + lookahead], np.dtype("<i4"))
    digest = b""
    for start in range(0, num_pages * PAGE_SIZE, PAGE_SIZE):
        page = ids[start : start + PAGE_SIZE + lookahead]
        digest = hashlib.sha256(digest + page.tobytes()).digest()
        yield digest
