// The arithmetic of `meal_fast.ops.sample`, for a GPU's block of threads and, compiled by any C++
// compiler, for one thread of a CPU: tests run the latter against the plain torch form.
//
//   x  a row's logits, as float    top = max x    e = exp((x - top) * scale), scale = 1 / temperature
//   w  e, or 0 where truncation drops the column
//
// The token is the first at which the running sum of w passes u * sum(w); sums are double. What
// each step does, and why, is said once more in kernels/sample.py, of which this is the twin.
//
// A Team is the threads that share a row: rank(), size(), and reductions that all of them call and
// that give all of them the answer. With a Team of one they give back what they are given.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define MEAL_FAST_BOTH __host__ __device__ inline
#else
#define MEAL_FAST_BOTH inline
#endif

namespace meal_fast {

struct Options {
  uint64_t seed;
  float scale;    // 1 / temperature
  bool greedy;    // temperature 0
  int32_t top_k;  // 0: no limit; at most the vocabulary
  double top_p;
  float min_p;
};

struct Drawn {
  int64_t token;
  float logp;
  float truncated_logp;
};

// A row of logits, of any stride and any type that `to_float` knows.
template <typename Logit>
struct Row {
  const Logit* first;
  int64_t stride;
  int32_t columns;
};

MEAL_FAST_BOTH float to_float(float x) { return x; }

template <typename Logit>
MEAL_FAST_BOTH float logit(const Row<Logit>& row, int32_t column) {
  const float x = to_float(row.first[column * row.stride]);
  return x == 0 ? 0.0f : x;  // -0 is 0
}

MEAL_FAST_BOTH uint32_t bits_of(float x) {
  union { float value; uint32_t bits; } both;
  both.value = x;
  return both.bits;
}

// Integers above 0 in the order of the floats; and back.
MEAL_FAST_BOTH uint32_t order_of(float x) {
  const uint32_t bits = bits_of(x);
  return bits >= 0x80000000u ? ~bits : bits | 0x80000000u;
}

MEAL_FAST_BOTH float float_at(uint32_t order) {
  union { float value; uint32_t bits; } both;
  both.bits = order >= 0x80000000u ? order & 0x7fffffffu : ~order;
  return both.value;
}

// The difference comes first: it is 0 at the maximum, and no compiler can fuse the two.
MEAL_FAST_BOTH float share_of(float x, float top, float scale) { return expf((x - top) * scale); }

// Philox4x32-10 (Salmon et al., SC 2011): the first two words, as 53 bits of [0, 1).
MEAL_FAST_BOTH double uniform(uint64_t seed, int64_t row, int64_t position) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position);
  uint32_t c1 = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  uint32_t c2 = static_cast<uint32_t>(row);
  uint32_t c3 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = 0xD2511F53ull * c0, right = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(right);
    c3 = static_cast<uint32_t>(left);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return ((c0 >> 5) * 67108864.0 + (c1 >> 6)) / 9007199254740992.0;
}

// What truncation keeps: columns above `order`, those at it up to `last`, if e is at least min_p.
struct Kept {
  uint32_t order;
  int32_t last;
  float min_p;

  MEAL_FAST_BOTH double weight(float x, int32_t column, float top, float scale) const {
    const float share = share_of(x, top, scale);
    const uint32_t place = order_of(x);
    const bool in = share >= min_p && (place > order || (place == order && column <= last));
    return in ? share : 0.0;
  }
};

// The largest order at or above which lie `wanted` columns, or (MASS) a mass of `wanted`, two bits
// at a time. What lies at `floor` or below is known to have enough.
template <bool MASS, typename Team, typename Logit>
MEAL_FAST_BOTH uint32_t threshold(Team& team, const Row<Logit>& row, float top, float scale,
                                  double wanted, uint32_t floor) {
  uint32_t found = 0;
  for (int shift = 30; shift >= 0; shift -= 2) {
    const uint32_t step = 1u << shift;
    double over[3] = {0, 0, 0};
    for (int32_t j = team.rank(); j < row.columns; j += team.size()) {
      const float x = logit(row, j);
      const uint32_t order = order_of(x);
      const double value = MASS ? share_of(x, top, scale) : 1.0;
      for (uint32_t i = 0; i < 3; ++i) over[i] += order >= found + (i + 1) * step ? value : 0.0;
    }
    uint32_t digit = 0;
    for (uint32_t i = 0; i < 3; ++i) {
      const double sum = team.sum(over[i]);
      digit += found + (i + 1) * step <= floor || sum >= wanted;
    }
    found += digit * step;
  }
  return found;
}

// How many columns lie above `order`, and their mass.
template <typename Team, typename Logit>
MEAL_FAST_BOTH void above(Team& team, const Row<Logit>& row, float top, float scale,
                          uint32_t order, double& count, double& mass) {
  count = mass = 0;
  for (int32_t j = team.rank(); j < row.columns; j += team.size()) {
    const float x = logit(row, j);
    if (order_of(x) > order) {
      count += 1;
      mass += share_of(x, top, scale);
    }
  }
  count = team.sum(count);
  mass = team.sum(mass);
}

// The column of the `room`-th of those at `order`; the last column when there are fewer.
template <typename Team, typename Logit>
MEAL_FAST_BOTH int32_t column_of_tie(Team& team, const Row<Logit>& row, uint32_t order,
                                     double room) {
  double before = 0;
  for (int32_t first = 0; first < row.columns; first += team.size()) {
    const int32_t j = first + team.rank();
    const bool tie = j < row.columns && order_of(logit(row, j)) == order;
    double count;
    const double rank = before + team.running_sum(tie ? 1.0 : 0.0, count);
    if (before + count >= room) return team.min(tie && rank == room ? j : row.columns);
    before += count;
  }
  return row.columns;
}

template <typename Team, typename Logit>
MEAL_FAST_BOTH double mass_of(Team& team, const Row<Logit>& row, float top, float scale,
                              const Kept& kept) {
  double mass = 0;
  for (int32_t j = team.rank(); j < row.columns; j += team.size())
    mass += kept.weight(logit(row, j), j, top, scale);
  return team.sum(mass);
}

// The first column with w > 0 at which the running sum passes `mark`, or the last with w > 0.
// First the tile, by its sum; then, a team at a time, the column in it.
template <typename Team, typename Logit>
MEAL_FAST_BOTH int32_t find(Team& team, const Row<Logit>& row, float top, float scale,
                            const Kept& kept, double mark) {
  const int32_t tile = 8 * team.size();
  double before = 0;
  int32_t last = 0;
  for (int32_t first = 0; first < row.columns; first += tile) {
    const int32_t end = first + tile < row.columns ? first + tile : row.columns;
    double mass = 0;
    for (int32_t j = first + team.rank(); j < end; j += team.size()) {
      const double w = kept.weight(logit(row, j), j, top, scale);
      mass += w;
      if (w > 0) last = j;
    }
    mass = team.sum(mass);
    if (before + mass > mark) {
      for (int32_t at = first; at < end; at += team.size()) {
        const int32_t j = at + team.rank();
        const double w = j < end ? kept.weight(logit(row, j), j, top, scale) : 0.0;
        double sum;
        const double running = before + team.running_sum(w, sum);
        const int32_t token = team.min(w > 0 && running > mark ? j : row.columns);
        if (token < row.columns) return token;
        before += sum;
      }
      break;  // summing in another order took the mark out of reach
    }
    before += mass;
  }
  return team.max(last);
}

// All threads of the team return the same. A row that is no distribution gives NaN, and a token
// that exists.
template <typename Team, typename Logit>
MEAL_FAST_BOTH Drawn draw(Team& team, const Row<Logit>& row, const Options& options,
                          int64_t row_id, int64_t position) {
  float top = -INFINITY;
  for (int32_t j = team.rank(); j < row.columns; j += team.size())
    top = fmaxf(top, logit(row, j));
  top = team.max(top);
  const float scale = options.scale;
  const Kept everything{0, row.columns, 0.0f};
  // A NaN is not above min_p, so the full sum asks nothing.
  double full = 0;
  int32_t token = row.columns - 1;
  for (int32_t j = team.rank(); j < row.columns; j += team.size()) {
    const float x = logit(row, j);
    full += share_of(x, top, scale);
    if (x == top && j < token) token = j;
  }
  full = team.sum(full);
  double mass = full;
  if (options.greedy) {
    token = team.min(token);
  } else {
    Kept kept = everything;
    kept.min_p = options.min_p;
    double room = 0, count, over;
    if (options.top_k > 0) {
      kept.order = threshold<false>(team, row, top, scale, options.top_k, 0);
      above(team, row, top, scale, kept.order, count, over);
      room = options.top_k - count;
      mass = over + room * share_of(float_at(kept.order), top, scale);
    }
    if (options.top_p < 1) {
      const double wanted = options.top_p * mass;
      const uint32_t floor = kept.order;
      kept.order = threshold<true>(team, row, top, scale, wanted, floor);
      above(team, row, top, scale, kept.order, count, over);
      // A tie is kept while the mass before it is short of what is wanted.
      const double share = share_of(float_at(kept.order), top, scale);
      const double ties = fmax(ceil((wanted - over) / share), 1.0);
      room = options.top_k > 0 && kept.order == floor ? fmin(ties, room) : ties;
    }
    if (room > 0) kept.last = column_of_tie(team, row, kept.order, room);
    if (room > 0 || options.min_p > 0) mass = mass_of(team, row, top, scale, kept);
    token = find(team, row, top, scale, kept, uniform(options.seed, row_id, position) * mass);
  }
  const double gap = (logit(row, token) - top) * scale;
  const float logp = static_cast<float>(gap - log(full));
  float truncated = logp - logp;  // NaN where the row is no distribution
  if (!options.greedy && truncated == 0) truncated = static_cast<float>(gap - log(mass));
  return {token, logp, truncated};
}

}  // namespace meal_fast
