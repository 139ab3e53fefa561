// Scores of the *_coopmat kernels, kept in powers of two.
#include "common/coopmat_types.glsl"
#include "common/levels.glsl"
#include "common/scores.glsl"

const float LOG2_E = 1.4426950408889634;
const float LN_2 = 0.6931471805599453;

// Without a soft cap or a bias a score is a product times a constant, applied with the exponential.
const bool TRANSFORMED = (FEATURES & (FEATURE_SOFT_CAP | FEATURE_BIAS)) != 0;

#define ABSENT 0x7fffffffu

// log2 of a weight is `lane_score(..).log2_value` times this, less the row's reference. Not zero,
// so that a hidden -INFINITY stays one. A sign below zero would turn maxima into minima: the
// kernels give it to a factor of the products.
float score_factor() { return TRANSFORMED ? 1.0 : max(abs(PARAMS.scale) * LOG2_E, 1e-30); }
bool negate_products() { return !TRANSFORMED && PARAMS.scale < 0.0; }

// What gradients of products are multiplied by at the end.
float slope_factor() { return TRANSFORMED ? 1.0 : PARAMS.scale; }

struct LaneScore {
  float log2_value;
  float slope;  // TRANSFORMED only: d score / d product
};

LaneScore lane_score(float product, uint position, uint head, uint key) {
  if (TRANSFORMED) {
    Score score = score_of(product, position, head, key, true);
    return LaneScore(score.value * LOG2_E, score.slope);
  }
  return LaneScore(visible(position, head, key) ? product : -INFINITY, 1.0);
}

// Of a coarse row, to log2 of whose weight `offset` is added.
LaneScore coarse_lane_score(float product, uint position, uint head, uint row, float offset) {
  if (position >= query_limit) return LaneScore(-INFINITY, 1.0);
  if (TRANSFORMED) {
    Score score = transformed_score(product, position, head, first_key_of(row));
    return LaneScore(fma(score.value, LOG2_E, offset), score.slope);
  }
  return LaneScore(fma(offset, 1.0 / score_factor(), product), 1.0);
}

// Backward: what log2 of a weight is relative to. A row that sees nothing has only hidden keys.
float weight_reference(float logsumexp) {
  return logsumexp == EMPTY_LOGSUMEXP ? 0.0 : logsumexp * LOG2_E;
}

// dS = P (dout . v - delta), for two elements. In a mixed block a hidden key counts for nothing,
// whatever its value holds.
vec2 score_gradients(vec2 weights, vec2 value_products, vec2 delta, bool mixed) {
  vec2 gradients = weights * (value_products - delta);
  return mixed ? mix(gradients, vec2(0), equal(weights, vec2(0))) : gradients;
}
