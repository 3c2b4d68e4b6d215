// Error feedback: adding what was not sent before to what is to be sent now.
//
// One rule for non-finite input holds in every family: where gradient + error is not finite, or exceeds the
// family's limit, the error stands, and the gradient element is dropped and counted. So the error feedback is
// always finite, and the caller, who sees the count, decides whether to raise or to skip the step.
#pragma once

#include <cfloat>
#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// One block: corrected = grad + error, or error where that is not finite. `corrected` may be `error`.
// Returns how many elements were dropped, and in *magnitude the sum of |corrected|.
int64_t correct_block(const float* grad, const float* error, float* corrected, int64_t n, double* magnitude);

// error += grad over n values; returns how many were dropped.
uint32_t correct_values(const float* grad, float* error, int64_t n, float limit = FLT_MAX);

// error += grad over n elements of any gradient type, on the calling thread. Returns how many were dropped.
int64_t correct_run(const void* grad, GradType type, float* error, int64_t n, float limit = FLT_MAX);

// The same, threaded.
int64_t error_correct(const void* grad, GradType type, float* error, int64_t n);

}  // namespace dear::compress::cpu
