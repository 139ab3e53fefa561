#include "vulkan/runtime.h"

#include <unistd.h>

#include "vulkan/text.h"

namespace jax_aat {

Runtime& Runtime::Get() {
  static auto* const runtime = new Runtime;
  return *runtime;
}

const Instance& Runtime::instance() {
  const std::lock_guard lock(mutex_);
  return InstanceLocked();
}

std::uint32_t Runtime::default_device() {
  const std::lock_guard lock(mutex_);
  if (!default_device_) default_device_ = InstanceLocked().ChooseDevice();
  return *default_device_;
}

void Runtime::set_default_device(std::uint32_t index) {
  const std::lock_guard lock(mutex_);
  RequireServed(PhysicalLocked(index));
  default_device_ = index;
}

std::shared_ptr<Context> Runtime::Acquire(std::uint32_t device) {
  if (Forked()) {
    throw Error(ErrorKind::kUnavailable,
                "This process was forked off one that uses Vulkan already, which drivers do not "
                "survive: start it by spawn (multiprocessing.get_context('spawn')).");
  }
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Context>& context = contexts_[device];
  if (context != nullptr && context->device().lost()) {
    const std::shared_ptr<Context> lost = std::move(context);
    if (!lost->device().loss_reported()) lost->device().RequireAlive();
  }
  if (context == nullptr) {
    context = std::make_shared<Context>(InstanceLocked(), PhysicalLocked(device));
    process_ = getpid();
  }
  return context;
}

std::shared_ptr<Context> Runtime::Existing(std::uint32_t device) {
  const std::lock_guard lock(mutex_);
  const auto found = contexts_.find(device);
  return found == contexts_.end() ? nullptr : found->second;
}

void Runtime::Shutdown() {
  if (Forked()) return;
  const std::lock_guard lock(mutex_);
  contexts_.clear();
}

bool Runtime::Forked() const { return process_ != 0 && process_ != getpid(); }

const Instance& Runtime::InstanceLocked() {
  if (instance_failure_) throw *instance_failure_;
  if (instance_ == nullptr) {
    try {
      instance_ = std::make_unique<Instance>();
    } catch (const Error& error) {
      instance_failure_ = error;
      throw;
    }
  }
  return *instance_;
}

const PhysicalDevice& Runtime::PhysicalLocked(std::uint32_t index) {
  const auto devices = InstanceLocked().devices();
  if (index >= devices.size()) {
    throw Error(ErrorKind::kInvalidArgument,
                Concat("There is no Vulkan device ", index, "; there are ", devices.size(), "."));
  }
  return devices[index];
}

}  // namespace jax_aat
