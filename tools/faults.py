"""The faults that tools/mutate.py plants, and the tests that must notice each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    tests: str

    def planted(self, source: str) -> str:
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: {self.what}: {source.count(self.old)} places for {self.old!r}; "
                "bring the table up to date"
            )
        return source.replace(self.old, self.new)


def faults_of(file: str, tests: str, *table: tuple[str, str, str]) -> list[Fault]:
    return [Fault(what, file, old, new, tests) for what, old, new in table]


FAULTS = faults_of(
    "kernels/linear_logprob.py",
    "tests/kernels/test_linear_logprob.py",
    ("mask of the last columns dropped", "if V % BLOCK_V != 0:", "if V % BLOCK_V < 0:"),
    (
        "a part walks past the vocabulary",
        "tl.minimum(first_tile + tiles_per_part, tl.cdiv(V, BLOCK_V))",
        "first_tile + tiles_per_part",
    ),
    (
        "maximum of a part starts at 0",
        '`top` is not.\n    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)',
        "`top` is not.\n    top = tl.full((BLOCK_N,), 0.0, tl.float32)",
    ),
    (
        "maximum of the merge starts at 0",
        'n_64 = n.to(tl.int64)\n\n    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)',
        "n_64 = n.to(tl.int64)\n\n    top = tl.full((BLOCK_N,), 0.0, tl.float32)",
    ),
    (
        "-inf - -inf in a tile",
        "d = tl.fma(z, scale, -shift[:, None])",
        "d = z * scale - new_top[:, None]",
    ),
    ("-inf - -inf between tiles", "tl.where(empty, 0.0, top - new_top)", "top - new_top"),
    ("0 * -inf in the moment", "p * tl.maximum(d, -200.0)", "p * d"),
    (
        "earlier tiles not rescaled",
        "total = fade * total + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
    ),
    (
        "moment not moved to the new maximum",
        "fade * (moment + total * drop) + tl.sum(p",
        "fade * moment + tl.sum(p",
    ),
    ("parts not rescaled", "tl.sum(fades * totals, 0)", "tl.sum(totals, 0)"),
    ("sign of the moment", "log_total - moment / total", "log_total + moment / total"),
    ("sign of the softcap", "tl.where(z < 0.0, -bent, bent)", "bent"),
    ("softcap without its slope", "* inverse_softcap * -2.0", "* inverse_softcap * -1.0"),
    ("bias of another tile", "tl.load(bias + columns,", "tl.load(bias + tl.arange(0, BLOCK_V),"),
    (
        "target taken in every tile",
        "(wanted - first_column)[:, None]",
        "(wanted % BLOCK_V)[:, None]",
    ),
    ("target outside not refused", 'tl.where(inside, value, float("nan"))', "value"),
    ("row mask of the outputs dropped", 'float("nan")), mask=live)', 'float("nan")))'),
    (
        "row mask of a part dropped",
        "tl.store(out + PICKED * n_64, picked, mask=live)",
        "tl.store(out + PICKED * n_64, picked)",
    ),
    (
        "32-bit offset of a part",
        "part.to(tl.int64) * part_stride + rows",
        "part * part_stride + rows",
    ),
    (
        "32-bit offset in the merge",
        "part.to(tl.int64)[:, None] * part_stride",
        "part[:, None] * part_stride",
    ),
    ("programs in another order", "part = within // height", "part = within // GROUP"),
    ("rows of bytes that do not align", "row_bytes % 16 == 0 and", "row_bytes % 2 == 0 and"),
    ("temperature multiplied", "/ (temperature * math.log(2))", "* temperature / math.log(2)"),
)

FAULTS += faults_of(
    "kernels/vocabulary.py",
    "tests/kernels/test_vocabulary.py",
    (
        "mask of the last columns dropped",
        "inside = (columns >= 0) & (columns < V)",
        "inside = columns >= 0",
    ),
    (
        "maximum starts at 0",
        'top = tl.full((), float("-inf"), tl.float32)\n    total =',
        "top = tl.full((), 0.0, tl.float32)\n    total =",
    ),
    (
        "maximum of the reference starts at 0",
        'top_q = tl.full((), float("-inf"), tl.float32)',
        "top_q = tl.full((), 0.0, tl.float32)",
    ),
    (
        "-inf - -inf before the first block",
        'tl.where(top == float("-inf"), 0.0, top - anchor)',
        "top - anchor",
    ),
    ("sign of the entropy's gradient", "inner -= b * (u - mean_u)", "inner += b * (u - mean_u)"),
    ("sign of the log-probability's gradient", "inner -= a", "inner += a"),
    ("mean gap dropped from the KL's gradient", "c * (z - z_q - gap)", "c * (z - z_q)"),
    (
        "columns that only the reference has",
        "rest * tl.exp(gap - top + top_q - log_total), 0.0)",
        "0.0, 0.0)",
    ),
    ("sign of the softcap", "tl.where(x < 0, -y, y)", "y"),
    ("slope of the softcap dropped", "dz * slope * scale", "dz * scale"),
    (
        "target outside not refused",
        'tl.where(inside, z - top - log_total, float("nan"))',
        "z - top - log_total",
    ),
    (
        "mask of the gradient's store dropped",
        "tl.store(grad + columns, dz, mask=columns < V)",
        "tl.store(grad + columns, dz)",
    ),
    ("32-bit offset of a column", "columns.to(tl.int64) * stride", "columns * stride"),
    (
        "32-bit offset of a sequence",
        "(row // inner) * outer_stride",
        "((row // inner) * outer_stride).to(tl.int32)",
    ),
    ("-inf - -inf in a block", 'anchor = tl.where(new == float("-inf"), 0.0, new)', "anchor = new"),
    (
        "moment not moved to the new maximum",
        "a NaN is left to `total`.\n        weighted = (weighted + total * moved) * factor",
        "a NaN is left to `total`.\n        weighted = weighted * factor",
    ),
    (
        "earlier blocks not rescaled",
        "total = total * factor + e\n    s = tl.sum(total, 0)\n    log_total = tl.log(s)",
        "total = total + e\n    s = tl.sum(total, 0)\n    log_total = tl.log(s)",
    ),
    (
        "the reference's unshared mass left out",
        "small = tl.sum(excess, 0) + rest",
        "small = tl.sum(excess, 0)",
    ),
    ("textbook KL", "_log1p(small), large)", "large, large)"),
    ("KL's terms not centred", "_excess(z - z_q - gap)", "_excess(z - z_q)"),
    ("KL's derivative not centred", "inner += c * (z - z_q - gap)", "inner += c * (z - z_q)"),
    ("0 * -inf in the gradient", "dz = tl.where(p == 0, 0.0, p * inner)", "dz = p * inner"),
    (
        "rows left out keep what was there",
        "tl.store(grad + columns, zero, mask=columns < V)",
        "tl.store(grad + columns, zero, mask=columns < 0)",
    ),
    ("a coefficient's stride assumed", "g.to(torch.float32).contiguous()", "g.to(torch.float32)"),
)

FAULTS += faults_of(
    "kernels/group_advantages.py",
    "tests/kernels/test_group_advantages.py",
    ("sign of the score", "score = -top\n", "score = top\n"),
    ("sign of the weights' gradient", "by_weight = -gap * share", "by_weight = gap * share"),
    ("dropped rows counted", "count += kept.to(tl.int32)", "count += inside.to(tl.int32)"),
    (
        "variance divided by n",
        "tl.sum(square, axis=0) / tl.maximum(n - 1, 1)",
        "tl.sum(square, axis=0) / tl.maximum(n, 1)",
    ),
    (
        "mask of the objectives dropped",
        'tl.where((k < K)[None, :], w * gap, float("-inf"))',
        "w * gap",
    ),
    (
        "equal scores not told apart",
        "tl.where(kept & (flat == 0), advantage, 0.0)",
        "tl.where(kept, advantage, 0.0)",
    ),
    ("mean not in the gradient", "u - mean_u - slope", "u - slope"),
    (
        "a group past the rows",
        "tl.minimum(tl.load(offsets_ptr + group + 1), rows)",
        "tl.load(offsets_ptr + group + 1)",
    ),
)

FAULTS += faults_of(
    "kernels/policy_loss.py",
    "tests/kernels/test_policy_loss.py",
    (
        "mask of the caller dropped",
        "live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)",
        "live = live",
    ),
    ("mask of the last tokens dropped", "live = i < tokens\n", "live = i >= 0\n"),
    ("sign of the policy's term", "policy = -tl.where(bound", "policy = tl.where(bound"),
    (
        "the clip takes the larger term",
        "-tl.where(bound < free, bound, free)",
        "-tl.where(bound > free, bound, free)",
    ),
    ("sign of k1", "kl = -gap\n            d_kl += 1", "kl = gap\n            d_kl += 1"),
    ("sign of k3's gradient", "gap_moves, -slope, 0.0)", "gap_moves, slope, 0.0)"),
    (
        "clamp of the gap dropped",
        "gap = tl.where(gap > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, gap)",
        "gap = gap",
    ),
    (
        "importance weight not in the gradient",
        "d_policy *= importance_weight",
        "d_policy *= 1.0",
    ),
    (
        "inactive tokens in the mean ratio",
        "tl.sum(tl.where(active, ratio, 0.0), axis=0)",
        "tl.sum(ratio, axis=0)",
    ),
)

FAULTS += faults_of(
    "kernels/policy_loss.py",
    "tests/ops/test_fused.py",
    ("the terms not divided", "coefficient /= total\n", "coefficient = coefficient\n"),
    ("a chunk writes over the last one's sums", "self.filled += blocks", "self.filled += 0"),
    ("its ratio's gradient twice", "d_term = tl.zeros_like(d_policy)", "d_term = d_policy"),
    ("the mean log-ratio not taken", "log_ratio = mean_log_ratio", "log_ratio = log_ratio"),
    ("a sequence loses its tokens of A = 0", "if not ALL_ACTIVE:", "if not WITH_KL:"),
)

FAULTS += faults_of(
    "kernels/sample.py",
    "tests/kernels/test_sample.py",
    ("mask of the last columns dropped", "mask=column < V, other", "mask=column < V + 1, other"),
    ("-0 is below 0", "return tl.where(x == 0, 0.0, x), column", "return x, column"),
    ("order of negative floats", "bits ^ 0xFFFFFFFF, bits | 0x80000000", "bits, bits | 0x80000000"),
    ("a digit too few", "for digit in range(16):", "for digit in range(15):"),
    ("top-k counts what is equal as above", "(order_of(x) > order)", "(order_of(x) >= order)"),
    ("ties over-accept", "(column <= last)", "(column < V)"),
    ("a tie short", "tl.ceil((wanted - over)", "tl.floor((wanted - over)"),
    ("top-p of all, not of top-k's", "kept = over + room *", "kept = kept + 0 * room *"),
    ("min-p ignored", "(share >= min_p)", "(share >= 0)"),
    ("temperature ignored", "tl.exp((x - top) * scale)", "tl.exp(x - top)"),
    (
        "high words of the counter swapped",
        "(position >> 32).to(tl.uint32)",
        "(row >> 32).to(tl.uint32)",
    ),
    ("26 bits of the uniform", "(low >> 6).to(tl.float64)", "0.0"),
    (
        "a token without mass",
        "(carry + tl.cumsum(w, 0) > mark) & (w > 0)",
        "carry + tl.cumsum(w, 0) > mark",
    ),
    ("the carry forgotten", "past = (carry + tl.cumsum", "past = (tl.cumsum"),
    (
        "past the end, token 0",
        "tl.where(token < 0, tl.max(last_kept, 0), token)",
        "tl.where(token < 0, 0, token)",
    ),
    (
        "32-bit offset of a row",
        "program = tl.program_id(0).to(tl.int64)",
        "program = tl.program_id(0).to(tl.int8)",
    ),
    (
        "greedy takes the last maximum",
        "argmax = tl.where((x == top) & (column < argmax)",
        "argmax = tl.where((x == top)",
    ),
    ("full mass in the truncated log-probability", "(gap - tl.log(kept))", "(gap - tl.log(full))"),
)

FAULTS += faults_of(
    "kernels/prefix_attention.py",
    "tests/kernels/test_prefix_attention.py",
    ("mask of what is not seen dropped", 'tl.where(seen[None, :], z, -float("inf"))', "z"),
    (
        "mask of the prefix's tokens dropped",
        "seen = token < length\n",
        "seen = token < capacity\n",
    ),
    (
        "mask of the tail's tokens dropped",
        "seen = token < to_token\n",
        "seen = token < capacity\n",
    ),
    (
        "maximum of a part starts at 0",
        'top = tl.full((TILE,), -float("inf"), tl.float32)',
        "top = tl.full((TILE,), 0.0, tl.float32)",
    ),
    (
        "maximum of the merge starts at 0",
        'top = tl.full((BLOCK_M,), -float("inf"), tl.float32)',
        "top = tl.full((BLOCK_M,), 0.0, tl.float32)",
    ),
    (
        "-inf - -inf in a block",
        'shift = tl.where(new_top == -float("inf"), 0.0, new_top)\n    p =',
        "shift = new_top\n    p =",
    ),
    (
        "-inf - -inf in the merge",
        'shift = tl.where(new_top == -float("inf"), 0.0, new_top)\n        fade =',
        "shift = new_top\n        fade =",
    ),
    ("earlier blocks not rescaled", "fade[:, None] * acc, input_precision", "acc, input_precision"),
    ("earlier sum not rescaled", "fade * total + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    ("parts not rescaled", "+ grow[:, None] * values", "+ values"),
    ("a part's sum not rescaled", "+ grow * more", "+ more"),
    ("parts of other rows", "at += tl.num_programs(0) * (HEADS * REP)", "at += HEADS * REP"),
    (
        "sums of nothing are read",
        "mask=seen[:, None] & (d < D)[None, :], other=0.0)\n        new_top",
        "mask=inside, other=0.0)\n        new_top",
    ),
    ("rows in their own order", "tl.load(order + place, mask=live, other=0)", "place"),
    ("too few tiles for a group", "(ends - begins) * REP + TILE - 1", "(ends - begins) + TILE - 1"),
    (
        "too few tiles for all groups",
        "min(b, r) + r * rep // TILE\n    block, options = _tiling(d, q",
        "min(b, r)\n    block, options = _tiling(d, q",
    ),
    ("another query head", "flat % REP).to", "flat // REP % REP).to"),
    (
        "32-bit offset of a token",
        "token_64 = token.to(tl.int64)[:, None]\n            k =",
        "token_64 = token[:, None]\n            k =",
    ),
    (
        "32-bit offset of a tail's token",
        "token_64 = token.to(tl.int64)[:, None]\n        k =",
        "token_64 = token[:, None]\n        k =",
    ),
    (
        "32-bit offset of a prefix",
        "group = tl.sum(tl.where(mine, g, 0), 0).to(tl.int64)",
        "group = tl.sum(tl.where(mine, g, 0), 0)",
    ),
    (
        "32-bit offset of a row",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
    ),
    ("group out of range read", "known = (g >= 0) & (g < b)", "known = g < b"),
    (
        "length out of range not refused",
        "& (length >= 0) & (length <= capacity)",
        "& (length >= 0)",
    ),
)
