"""Segments of rows that are stretched to a multiple, as some precisions want them, change no result."""

import pytest
import torch
from torch import Tensor, nn

from src.models.moe.experts import Experts, fill, filling, unfill


def test_segments_by_hand() -> None:
    places, slots, ends = filling(torch.tensor([3, 0, 4, 1]), 8, 4)
    assert places.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # 3 rows and a hole, nothing, 4 rows, 1 row
    assert slots.tolist() == [0, 1, 2, 8, 3, 4, 5, 6, 7, *[8] * 11]  # room for 3 holes in each of 4 segments
    assert ends.tolist() == [4, 4, 8, 20]
    assert ends.dtype == torch.int32


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [16, 0, 32, 16], [1, 1, 1, 1], [0, 0, 0, 37], [37, 0, 0, 0]])
def test_every_row_keeps_its_expert(counts: list[int]) -> None:
    places, slots, ends = filling(torch.tensor(counts), sum(counts), 16)
    starts = [0, *ends.tolist()[:-1]]
    assert all(end % 16 == 0 for end in ends)
    assert int(ends[-1]) == len(slots)
    expert = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, place in enumerate(places.tolist()):
        assert starts[expert[row]] <= place < int(ends[expert[row]])
        assert int(slots[place]) == row
    assert int((slots < sum(counts)).sum()) == sum(counts)


def test_filling_is_undone_and_has_exact_gradients() -> None:
    places, slots, _ = filling(torch.tensor([3, 0, 2]), 5, 4)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    wide = fill(x, places, slots)
    assert torch.equal(unfill(wide, places, slots), x)
    assert float(wide.detach().abs().sum(-1)[slots == 5].max()) == 0.0
    assert torch.autograd.gradcheck(lambda rows: fill(rows, places, slots), x)
    assert torch.autograd.gradcheck(lambda rows: unfill(rows, places, slots), wide.detach().requires_grad_())


@pytest.mark.parametrize("counts", [[12, 0, 17, 1], [0, 0, 0, 30]])
def test_filled_segments_give_the_same_numbers(counts: list[int]) -> None:
    torch.manual_seed(0)
    experts, rows, weights = Experts(4, 32, 24), torch.randn(30, 32, requires_grad=True), torch.rand(30)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    probe = torch.randn(30, 32)

    def results() -> list[Tensor]:
        out = experts(rows, torch.tensor(counts), weights)
        return [out, *torch.autograd.grad((out * probe).sum(), [rows, *experts.parameters()])]

    plain = results()
    experts.multiple = 16
    for filled, wanted in zip(results(), plain, strict=True):
        torch.testing.assert_close(filled, wanted, atol=1e-6, rtol=1e-5)
