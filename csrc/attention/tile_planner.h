// The dispatches that make the plan of an adaptive call, or the prices it is made from.
#pragma once

#include "attention/plan_builder.h"

namespace jax_aat {

void AddTilePlan(PlanBuilder& builder);

}  // namespace jax_aat
