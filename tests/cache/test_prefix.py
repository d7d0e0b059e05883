"""The prefix index against a plain dictionary of whole prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_jax.cache.layout import PAGE_SIZE
from flashmla_jax.cache.prefix import PrefixIndex


class Model:
    """What the index is to do, by searching everything every time."""

    def __init__(self):
        self.pages = {}  # prefix: page
        self.used = {}  # page: (time, insertion)
        self.users = {}
        self.time = 0

    def prefixes(self, tokens, n):
        return [tuple(tokens[: (i + 1) * PAGE_SIZE]) for i in range(n)]

    def touch(self, pages):
        self.time += 1
        for page in pages:
            self.used[page] = (self.time, self.used.get(page, (0, self.time, page))[1], page)

    def match(self, tokens):
        found = []
        for prefix in self.prefixes(tokens, (len(tokens) - 1) // PAGE_SIZE):
            if prefix not in self.pages:
                break
            found.append(self.pages[prefix])
        return found

    def insert(self, tokens, numbers):
        new = []
        prefixes = self.prefixes(tokens, len(numbers))
        for prefix, number in zip(prefixes, numbers, strict=True):
            if prefix not in self.pages:
                self.pages[prefix] = number
                self.users[number] = 0
                new.append(number)
        self.touch([self.pages[prefix] for prefix in prefixes])
        return new

    def change_users(self, pages, change):
        self.touch(pages)
        for page in pages:
            self.users[page] += change

    def later(self, prefix):
        return [p for p in self.pages if len(p) > len(prefix) and p[: len(prefix)] == prefix]

    def num_evictable(self):
        return sum(
            not any(self.users[self.pages[p]] for p in [prefix, *self.later(prefix)])
            for prefix in self.pages
        )

    def evict(self, count):
        evicted = []
        while len(evicted) < count:
            leaves = [
                (self.used[page], page, prefix)
                for prefix, page in self.pages.items()
                if not self.users[page] and not self.later(prefix)
            ]
            if not leaves:
                break
            _, page, prefix = min(leaves)
            del self.pages[prefix], self.used[page], self.users[page]
            evicted.append(page)
        return evicted


# Sequences of pages, of which there are few, so that they share beginnings.
contents = st.lists(st.integers(0, 1), max_size=4)
operations = st.one_of(
    st.tuples(st.just("insert"), contents),
    st.tuples(st.just("match"), contents, st.sampled_from([-1, 0, 1])),
    st.tuples(st.just("start"), contents),
    st.tuples(st.just("end"), st.integers(0, 5)),
    st.tuples(st.just("evict"), st.integers(0, 4)),
)


def tokens_of(pages):
    return [x * 1000 + i for x in pages for i in range(PAGE_SIZE)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(operations, max_size=25))
def test_lives_like_a_plain_dictionary(life):
    index, model, running, free = PrefixIndex(), Model(), [], list(range(1000))
    for name, argument, *more in life:
        if name == "insert":
            tokens = tokens_of(argument)
            # As a sequence does that adopts what matches and has pages of its own for the rest.
            pages = index.match(tokens)[0]
            pages += [free.pop() for _ in argument[len(pages) :]]
            retained = index.insert(tokens, pages)
            assert retained == model.insert(tokens, pages)
            assert all(page in index for page in retained)
        elif name == "match":
            tokens = [*tokens_of(argument), 7][: len(argument) * PAGE_SIZE + more[0]]
            pages, covered = index.match(tokens)
            assert pages == (model.match(tokens) if tokens else [])
            assert covered == len(pages) * PAGE_SIZE
            assert covered < max(len(tokens), 1)
        elif name == "start":
            pages, _ = index.match([*tokens_of(argument), 7])
            index.acquire(pages)
            model.change_users(pages, 1)
            running.append(pages)
        elif name == "end" and argument < len(running):
            pages = running.pop(argument)
            index.release(pages)
            model.change_users(pages, -1)
        elif name == "evict":
            evictable = index.num_evictable
            evicted = index.evict(argument)
            assert evicted == model.evict(argument)
            assert len(evicted) == min(argument, evictable)
            assert not any(page in index for page in evicted)
        assert len(index) == len(model.pages)
        assert index.num_evictable == model.num_evictable()
    for pages in running:
        index.release(pages)
        model.change_users(pages, -1)
    assert index.evict(1000) == model.evict(1000)
    assert len(index) == index.num_evictable == 0


def test_a_prompt_is_never_covered_whole():
    index = PrefixIndex()
    tokens = list(range(2 * PAGE_SIZE))
    assert index.insert(tokens, [5, 3]) == [5, 3]
    assert index.match(tokens) == ([5], PAGE_SIZE)
    assert index.match([*tokens, 0]) == ([5, 3], 2 * PAGE_SIZE)
    assert index.match(tokens[:PAGE_SIZE]) == ([], 0)
    assert index.match([]) == ([], 0)


def test_a_page_is_known_by_all_tokens_before_it():
    index = PrefixIndex()
    page = list(range(PAGE_SIZE))
    index.insert([*page, *page], [0, 1])
    assert index.match([*page, *page, *page])[0] == [0, 1]
    assert index.match([*reversed(page), *page, 0])[0] == []


def test_lookahead():
    """A page is known by the token after it, too."""
    index = PrefixIndex(lookahead=1)
    tokens = list(range(2 * PAGE_SIZE + 1))
    with pytest.raises(ValueError, match=r"2 pages hold 128, got 128 with a lookahead of 1"):
        index.insert(tokens[:-1], [5, 3])
    assert index.insert(tokens, [5, 3]) == [5, 3]
    assert index.match(tokens) == ([5, 3], 2 * PAGE_SIZE)
    assert index.match([*tokens[:-1], 7]) == ([5], PAGE_SIZE)
    assert index.match(tokens[:-1]) == ([5], PAGE_SIZE)
    assert index.match(tokens[:PAGE_SIZE]) == index.match([]) == ([], 0)
    assert index.insert(tokens[:10], []) == []
    assert index.insert([*tokens[:-1], 7], [5, 4]) == [4]


def test_arrays_of_any_integers_are_the_same_tokens():
    index = PrefixIndex()
    tokens = np.arange(PAGE_SIZE + 1)
    index.insert(tokens.astype(np.int64), [4])
    assert index.match(tokens.astype(np.int32).tolist())[0] == [4]
    assert index.match(tokens.astype(np.uint16))[0] == [4]


def test_the_first_page_for_a_content_stays():
    index = PrefixIndex()
    tokens = list(range(2 * PAGE_SIZE))
    assert index.insert(tokens[:PAGE_SIZE], [1]) == [1]
    assert index.insert(tokens, [8, 9]) == [9]
    assert index.match([*tokens, 0])[0] == [1, 9]
    index.acquire([9])
    assert index.evict(2) == []  # 9 could not be found without 1
    index.release([9])
    assert index.evict(2) == [9, 1]


def test_least_recently_used_goes_first():
    index = PrefixIndex()
    for page in range(3):
        index.insert([page] * PAGE_SIZE, [page])
    index.acquire([0])
    index.release([0])
    assert index.evict(2) == [1, 2]


def test_long_chains():
    """Longer than Python can recurse."""
    index = PrefixIndex()
    pages = list(range(3000))
    index.insert(np.zeros(3000 * PAGE_SIZE, np.int32), pages)
    index.acquire(pages)
    index.acquire(pages[-1:])
    index.release(pages)
    assert index.num_evictable == 0
    index.release(pages[-1:])
    assert index.num_evictable == 3000
    assert index.evict(3000) == pages[::-1]


def test_mistakes_change_nothing():
    index = PrefixIndex()
    tokens = list(range(2 * PAGE_SIZE))
    index.insert(tokens[:PAGE_SIZE], [0])
    with pytest.raises(ValueError, match=r"2 pages hold 128, got 127"):
        index.insert(tokens[:-1], [0, 1])
    with pytest.raises(ValueError, match="pages has 0, which holds other tokens"):
        index.insert(tokens, [1, 0])
    with pytest.raises(ValueError, match="pages has 7, which holds other tokens"):
        index.insert([3] * (2 * PAGE_SIZE), [7, 7])
    with pytest.raises(ValueError, match="pages has 1, which the index does not know"):
        index.acquire([0, 1])
    index.acquire([0])
    with pytest.raises(ValueError, match="pages has 0, which is not acquired that often"):
        index.release([0, 0])
    assert index.evict(1) == []
    index.release([0])
    assert index.evict(1) == [0]
