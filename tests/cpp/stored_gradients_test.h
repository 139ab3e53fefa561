#pragma once

namespace jax_aat {

void FuzzStoredGradients();

}  // namespace jax_aat
