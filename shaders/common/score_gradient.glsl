// The gradient of the scores: dS = P (dout . v - delta), delta = sum(dout * out) - dlogsumexp.
#include "common/scores.glsl"

// What the backward pass knows of one query.
struct QueryState {
  float logsumexp;
  float delta;
};

QueryState load_query_state(View logsumexp_view, View delta_view, uint position, uint head) {
  return QueryState(load_float(logsumexp_view.base, row_start(logsumexp_view, position, head)),
                    load_float(delta_view.base, row_start(delta_view, position, head)));
}

// `value_product`: dout . v. Zero where the key is hidden, whatever the operands hold.
float score_gradient(float weight, float value_product, float delta) {
  return weight == 0.0 ? 0.0 : weight * (value_product - delta);
}
