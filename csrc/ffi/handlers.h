// The custom calls that XLA calls.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_aat {

XLA_FFI_Error* ForwardOnHost(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* TangentOnHost(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* BackwardOnHost(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* PlanOnHost(XLA_FFI_CallFrame* frame);

XLA_FFI_Error* ForwardOnCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* TangentOnCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* BackwardOnCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* PlanOnCuda(XLA_FFI_CallFrame* frame);

}  // namespace jax_aat
