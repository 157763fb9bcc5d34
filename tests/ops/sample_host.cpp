// csrc/sample.cuh for one thread of a CPU, as a library that tests/ops/test_csrc_sample.py calls.
#include "sample.cuh"

namespace {

struct One {
  int32_t rank() const { return 0; }
  int32_t size() const { return 1; }
  double sum(double value) { return value; }
  float max(float value) { return value; }
  int32_t max(int32_t value) { return value; }
  int32_t min(int32_t value) { return value; }
  double running_sum(double value, double& total) { return total = value; }
};

}  // namespace

extern "C" double host_uniform(uint64_t seed, int64_t row, int64_t position) {
  return meal_fast::uniform(seed, row, position);
}

extern "C" int32_t host_find(const float* logits, int32_t columns, float top, double mark) {
  One team;
  const meal_fast::Row<float> row{logits, 1, columns};
  return meal_fast::find(team, row, top, 1.0f, meal_fast::Kept{0, columns, 0.0f}, mark);
}

extern "C" void host_sample(const float* logits, int64_t rows, int32_t columns, int64_t row_stride,
                            int64_t stride, const int64_t* row_id, const int64_t* position,
                            uint64_t seed, float scale, int32_t greedy, int32_t top_k,
                            double top_p, float min_p, int64_t* token, float* logp,
                            float* truncated_logp) {
  const meal_fast::Options options{seed, scale, greedy != 0, top_k, top_p, min_p};
  for (int64_t r = 0; r < rows; ++r) {
    One team;
    const meal_fast::Row<float> row{logits + r * row_stride, stride, columns};
    const meal_fast::Drawn drawn = draw(team, row, options, row_id[r], position[r]);
    token[r] = drawn.token;
    logp[r] = drawn.logp;
    truncated_logp[r] = drawn.truncated_logp;
  }
}
