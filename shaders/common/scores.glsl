// From a product q . k to a score: scale, soft cap, bias; and the derivative of that.
#include "common/elementary.glsl"
#include "common/visibility.glsl"

View bias_view;

void set_scores(uint head) {
  set_visibility(head);
  if (has(FEATURE_BIAS)) bias_view = view_of(OPERAND_BIAS, head, BIAS_LOG2_BYTES);
}

struct Score {
  float value;
  float slope;  // d value / d product
};

Score transformed_score(float product, uint position, uint head, uint key) {
  Score score = Score(product * call.scale, call.scale);
  if (has(FEATURE_SOFT_CAP)) {
    float t = tanh_accurate(score.value / call.soft_cap);
    score.value = call.soft_cap * t;
    score.slope *= 1.0 - t * t;
  }
  if (has(FEATURE_BIAS)) {
    score.value += load_element(
        bias_view.base, row_start(bias_view, position, head) + key * bias_view.column_stride,
        BIAS_DTYPE);
  }
  return score;
}

// -inf where the score hides the key: hidden keys and those with a bias of -inf are treated alike.
Score score_of(float product, uint position, uint head, uint key, bool mixed) {
  if (mixed && !visible(position, head, key)) return Score(-INFINITY, 0.0);
  return transformed_score(product, position, head, key);
}

// exp(score - logsumexp), 0 for hidden keys whatever the logsumexp is.
float probability(float score, float logsumexp) {
  return score == -INFINITY ? 0.0 : exp_accurate(score - logsumexp);
}
