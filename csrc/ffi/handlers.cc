#include "ffi/handlers.h"

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>

#include "ffi/call.h"
#include "interop/cuda.h"
#include "interop/host.h"
#include "vulkan/logging.h"
#include "vulkan/status.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_aat::CallAttributes, StructMember<std::uint64_t>("operands"),
    StructMember<std::uint64_t>("results"), StructMember<float>("scale"),
    StructMember<float>("soft_cap"), StructMember<std::int32_t>("causal"),
    StructMember<std::int32_t>("window_left"), StructMember<std::int32_t>("window_right"),
    StructMember<std::uint32_t>("query_tile"), StructMember<std::uint32_t>("super_tile"),
    StructMember<std::uint32_t>("level_count"), StructMember<float>("candidate_share"),
    StructMember<float>("floor_share"), StructMember<std::uint32_t>("judged_key_tiles"),
    StructMember<std::uint32_t>("list_capacity"), StructMember<std::uint32_t>("corrects"));

namespace jax_aat {
namespace {

namespace ffi = xla::ffi;

ffi::ErrorCode CodeOf(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return ffi::ErrorCode::kInvalidArgument;
    case ErrorKind::kOutOfMemory:
      return ffi::ErrorCode::kResourceExhausted;
    case ErrorKind::kUnavailable:
      return ffi::ErrorCode::kUnavailable;
    case ErrorKind::kInternal:
      break;
  }
  return ffi::ErrorCode::kInternal;
}

// Runs `body`; no exception leaves it.
template <typename Body>
ffi::Error Guarded(const Body& body) {
  const auto fail = [](ffi::ErrorCode code, const char* words) {
    Log(LogLevel::kInfo, words);
    return ffi::Error(code, words);
  };
  try {
    body();
    return ffi::Error::Success();
  } catch (const Error& error) {
    return fail(CodeOf(error.kind()), error.what());
  } catch (const std::invalid_argument& error) {
    return fail(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return fail(ffi::ErrorCode::kResourceExhausted, "The host is out of memory.");
  } catch (const std::exception& error) {
    return fail(ffi::ErrorCode::kInternal, error.what());
  }
}

template <Pass pass>
ffi::Error OnHost(ffi::RemainingArgs args, ffi::RemainingRets rets, CallAttributes attributes) {
  return Guarded([&] {
    const AttentionCall call = MakeCall(pass, attributes, args, rets);
    RunOnHost(call.problem, call.buffers);
  });
}

template <Pass pass>
ffi::Error OnCuda(cuda::Stream stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs args,
                  ffi::RemainingRets rets, CallAttributes attributes) {
  return Guarded([&] {
    const AttentionCall call = MakeCall(pass, attributes, args, rets);
    RunOnCuda(call.problem, call.buffers, stream,
              [&](std::uint64_t bytes) { return scratch.Allocate(bytes).value_or(nullptr); });
  });
}

auto HostBinding() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs<CallAttributes>();
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cuda::Stream>>()
      .Ctx<ffi::ScratchAllocator>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<CallAttributes>();
}

XLA_FFI_DEFINE_HANDLER(kForwardOnHost, OnHost<Pass::kForward>, HostBinding());
XLA_FFI_DEFINE_HANDLER(kTangentOnHost, OnHost<Pass::kTangent>, HostBinding());
XLA_FFI_DEFINE_HANDLER(kBackwardOnHost, OnHost<Pass::kBackward>, HostBinding());
XLA_FFI_DEFINE_HANDLER(kPlanOnHost, OnHost<Pass::kPlan>, HostBinding());
XLA_FFI_DEFINE_HANDLER(kForwardOnCuda, OnCuda<Pass::kForward>, CudaBinding());
XLA_FFI_DEFINE_HANDLER(kTangentOnCuda, OnCuda<Pass::kTangent>, CudaBinding());
XLA_FFI_DEFINE_HANDLER(kBackwardOnCuda, OnCuda<Pass::kBackward>, CudaBinding());
XLA_FFI_DEFINE_HANDLER(kPlanOnCuda, OnCuda<Pass::kPlan>, CudaBinding());

}  // namespace

XLA_FFI_Error* ForwardOnHost(XLA_FFI_CallFrame* frame) { return kForwardOnHost(frame); }
XLA_FFI_Error* TangentOnHost(XLA_FFI_CallFrame* frame) { return kTangentOnHost(frame); }
XLA_FFI_Error* BackwardOnHost(XLA_FFI_CallFrame* frame) { return kBackwardOnHost(frame); }
XLA_FFI_Error* PlanOnHost(XLA_FFI_CallFrame* frame) { return kPlanOnHost(frame); }
XLA_FFI_Error* ForwardOnCuda(XLA_FFI_CallFrame* frame) { return kForwardOnCuda(frame); }
XLA_FFI_Error* TangentOnCuda(XLA_FFI_CallFrame* frame) { return kTangentOnCuda(frame); }
XLA_FFI_Error* BackwardOnCuda(XLA_FFI_CallFrame* frame) { return kBackwardOnCuda(frame); }
XLA_FFI_Error* PlanOnCuda(XLA_FFI_CallFrame* frame) { return kPlanOnCuda(frame); }

}  // namespace jax_aat
