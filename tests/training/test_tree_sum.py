"""A sum's rounding depends on its terms alone, not on who holds them or which comes first."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.training.tree_sum import TreeSum, nodes


def pairwise(terms):
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


def drawn(count):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(64, generator=generator) * 10.0 ** (i % 5) for i in range(count)]


@given(order=st.integers(1, 17).flatmap(lambda n: st.permutations(range(n))))
def test_the_order_of_the_terms_changes_no_bit(order):
    terms = drawn(len(order))
    tree = TreeSum(len(terms))
    for number in order:
        tree.add(number, [terms[number].clone()])
    assert torch.equal(tree.whole[0], pairwise(terms))


@given(owner=st.lists(st.integers(0, 4), min_size=1, max_size=17))
def test_nor_does_who_holds_them(owner):
    """Any leaves on any process: what each cannot add up is added up by all, as the tree says."""
    count, terms = len(owner), drawn(len(owner))
    whole = TreeSum(count)
    for process in range(5):
        mine = [n for n, by in enumerate(owner) if by == process]
        own = TreeSum(count)
        for number in mine:
            own.add(number, [terms[number].clone()])
        assert sorted(own.held) == nodes(mine, count)
        for node, part in own.held.items():
            whole.put(node, part)
    assert torch.equal(whole.whole[0], pairwise(terms))


def test_a_plain_sum_would_be_another_number():
    """Otherwise the tests above could not fail."""
    assert any(
        not torch.equal(pairwise(drawn(n)), sum(drawn(n)[1:], drawn(n)[0])) for n in range(3, 9)
    )
