// Sums of exponentials by sub-queries, as logarithms, over a workgroup.

// Sums of sub-queries that the workgroup finds together.
const uint TOGETHER = SUBS < REDUCED_AT_ONCE ? SUBS : REDUCED_AT_ONCE;


shared float sub_log_sum[SUBS];        // of the mass of what a sub-query sees
shared float sub_outside[SUBS];        // of what it sees elsewhere than the tile looks into

// A kernel defines HALF_PRODUCTS as true where it multiplies halves, on GPUs, whose own functions are
// accurate enough for that and take a tenth of the instructions.
#if HALF_PRODUCTS
float exp_of(float x) { return exp(x); }
float log_of(float x) { return log(x); }
#else
float exp_of(float x) { return exp_accurate(x); }
float log_of(float x) { return log_accurate(x); }
#endif

float log_or_none(float x) { return x > 0.0 ? log_of(x) : -INFINITY; }
float shift_of(float log_sum) { return log_sum == -INFINITY ? 0.0 : log_sum; }

// A sum of exponentials that grows term by term.
struct LogSum {
  float largest;
  float sum;  // of exp(x - largest)
};

void add_term(inout LogSum total, float x) {
  float share = x == -INFINITY ? 0.0 : exp_of(-abs(x - total.largest));
  total.sum = x > total.largest ? fma(total.sum, share, 1.0) : total.sum + share;
  total.largest = max(total.largest, x);
}

// With what lies outside, which is to have been set before the last barrier.
float log_sum_of(uint sub, float largest, float sum) {
  float inside = shift_of(largest) + log_or_none(sum);
  if (FOREMOST == 0 || sub_outside[sub] == -INFINITY) return inside;
  LogSum all = LogSum(sub_outside[sub], 1.0);
  add_term(all, inside);
  return all.largest + log_of(all.sum);
}

// The logarithms of the workgroup's sums, and of what lies outside, into sub_log_sum.
void join_log_sums(LogSum own[SUBS]) {
  for (uint first = 0; first < SUBS; first += TOGETHER) {
    float largest[TOGETHER];
    barrier();
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) {
      reduced[i * THREADS + gl_LocalInvocationID.x] = own[first + i].largest;
    }
    reduce_columns(TOGETHER, true);
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) largest[i] = reduced[i];
    barrier();
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) {
      float factor = exp_of(own[first + i].largest - shift_of(largest[i]));
      reduced[i * THREADS + gl_LocalInvocationID.x] = own[first + i].sum * factor;
    }
    reduce_columns(TOGETHER, false);
    if (gl_LocalInvocationID.x < TOGETHER) {
      uint i = gl_LocalInvocationID.x;
      sub_log_sum[first + i] = log_sum_of(first + i, largest[i], reduced[i]);
    }
  }
  barrier();
}
