// The dispatches that make the plan of an adaptive call, or the prices it is made from.
#pragma once

#include "attention/plan_builder.h"

namespace jax_aat {

void AddTilePlan(PlanBuilder& builder);
// The dispatch that counts what a plan leaves to compute.
void AddWorkCounts(PlanBuilder& builder);

}  // namespace jax_aat
