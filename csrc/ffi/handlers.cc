#include "ffi/handlers.h"

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>

#include "ffi/call.h"
#include "interop/host.h"
#include "vulkan/logging.h"
#include "vulkan/status.h"
#include "xla/ffi/api/ffi.h"

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
ffi::Error OnHost(ffi::RemainingArgs args, ffi::RemainingRets rets, std::uint32_t operands,
                  std::uint32_t results, float scale, float soft_cap, std::int32_t causal,
                  std::int32_t window_left, std::int32_t window_right) {
  return Guarded([&] {
    const CallAttributes attributes = {operands, results,     scale,       soft_cap,
                                       causal,   window_left, window_right};
    const AttentionCall call = MakeCall(pass, attributes, args, rets);
    RunOnHost(call.problem, call.buffers);
  });
}

auto Binding() {
  return ffi::Ffi::Bind()
      .RemainingArgs()
      .RemainingRets()
      .Attr<std::uint32_t>("operands")
      .Attr<std::uint32_t>("results")
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<std::int32_t>("causal")
      .Attr<std::int32_t>("window_left")
      .Attr<std::int32_t>("window_right");
}

XLA_FFI_DEFINE_HANDLER(kForwardOnHost, OnHost<Pass::kForward>, Binding());
XLA_FFI_DEFINE_HANDLER(kTangentOnHost, OnHost<Pass::kTangent>, Binding());
XLA_FFI_DEFINE_HANDLER(kBackwardOnHost, OnHost<Pass::kBackward>, Binding());

}  // namespace

XLA_FFI_Error* ForwardOnHost(XLA_FFI_CallFrame* frame) { return kForwardOnHost(frame); }
XLA_FFI_Error* TangentOnHost(XLA_FFI_CallFrame* frame) { return kTangentOnHost(frame); }
XLA_FFI_Error* BackwardOnHost(XLA_FFI_CallFrame* frame) { return kBackwardOnHost(frame); }

}  // namespace jax_aat
