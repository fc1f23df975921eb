"""Which page has which slot: beside a table in plain Python, on random schedules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.network.page_slots import assign


class Slots:
    """One layer's slots of one row. pages: by slot; used: when each page was last selected, by page."""

    def __init__(self, count: int) -> None:
        self.pages: list[int | None] = [None] * count
        self.used: dict[int, int] = {}
        self.step = 0

    def take(self, wanted: list[int]) -> tuple[int, int]:
        """Give each wanted page a slot; how many pages lost theirs, and how many had been there before."""
        self.step += bool(wanted)
        new = sorted(set(wanted) - set(self.pages))
        again, evicted = sum(page in self.used for page in new), 0
        self.used |= dict.fromkeys(wanted, self.step)
        for page in new:
            if None in self.pages:
                self.pages[self.pages.index(None)] = page
                continue
            oldest = min(range(len(self.pages)), key=lambda slot: (self.used[self.pages[slot]], slot))
            self.pages[oldest] = page
            evicted += 1
        return evicted, again


@pytest.mark.parametrize(("pages", "count"), [(16, 5), (81, 24), (9, 1), (9, 9)])
def test_the_page_selected_longest_ago_makes_room(pages, count):
    rng, rows = np.random.default_rng(pages), 3
    table, slots = torch.zeros(rows, 2, pages, dtype=torch.int64), [Slots(count) for _ in range(rows)]
    turned = np.zeros(2, np.int64)
    for _ in range(120):
        listed = np.stack([rng.permutation(pages) for _ in range(rows)])
        wanted = rng.integers(0, count + 1, rows) * rng.integers(0, 2, rows)  # some rows want nothing
        before = [set(each.pages) - {None} for each in slots]
        found = assign(table, torch.from_numpy(listed), torch.from_numpy(wanted), count)
        for row, each in enumerate(slots):
            turnover = each.take(listed[row, : wanted[row]].tolist())
            turned += turnover
            assert found.turnover[row].tolist() == list(turnover)
            assert set(found.held[row].nonzero().flatten().tolist()) == before[row]
            expected = {page: slot for slot, page in enumerate(each.pages) if page is not None}
            places = found.slots[row].tolist()
            assert {page: slot for page, slot in enumerate(places) if slot >= 0} == expected
            assert sorted(found.listed[row].tolist()) == list(range(count))
            read = found.listed[row, : wanted[row]].tolist()
            assert read == [expected[page] for page in listed[row, : wanted[row]].tolist()]
        assert torch.equal(found.count, torch.from_numpy(wanted))
        table = found.table
    assert count == pages or (turned > 0).all()


def test_of_more_pages_than_slots_the_first_are_taken():
    listed = torch.tensor([[7, 2, 5, 0, 1, 3, 4, 6, 8]])
    found = assign(torch.zeros(1, 2, 9, dtype=torch.int64), listed, torch.tensor([5]), 3)
    assert found.count.tolist() == [3] and found.listed.tolist() == [[2, 0, 1]]
    assert found.slots.tolist() == [[-1, -1, 0, -1, -1, 1, -1, 2, -1]] and found.turnover.tolist() == [[0, 0]]
