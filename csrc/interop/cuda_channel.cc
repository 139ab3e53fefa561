#include "interop/cuda_channel.h"

namespace jax_aat {

CudaChannel::CudaChannel(const Device& device, cuda::Stream stream)
    : device_(device), stream_(stream) {
  const VkExportSemaphoreCreateInfo exported = {
      .sType = VK_STRUCTURE_TYPE_EXPORT_SEMAPHORE_CREATE_INFO,
      .handleTypes = VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT,
  };
  const VkSemaphoreTypeCreateInfo type = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
      .pNext = &exported,
      .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE,
  };
  const VkSemaphoreCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO,
      .pNext = &type,
  };
  device.Check(device.vk().CreateSemaphore(device.handle(), &info, nullptr, &timeline_),
               "vkCreateSemaphore");
  try {
    const VkSemaphoreGetFdInfoKHR get = {
        .sType = VK_STRUCTURE_TYPE_SEMAPHORE_GET_FD_INFO_KHR,
        .semaphore = timeline_,
        .handleType = VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT,
    };
    cuda::ExternalSemaphoreHandleDesc handle = {.handle = {.type = cuda::kTimelineSemaphoreFd}};
    device.Check(device.vk().GetSemaphoreFdKHR(device.handle(), &get, &handle.handle.fd),
                 "vkGetSemaphoreFdKHR");
    const cuda::Driver& driver = cuda::Driver::Get();
    // The import takes the file descriptor over.
    driver.Check(driver.ImportSemaphore(&imported_, &handle), "cuImportExternalSemaphore");
  } catch (...) {
    device.vk().DestroySemaphore(device.handle(), timeline_, nullptr);
    throw;
  }
}

CudaChannel::~CudaChannel() {
  cuda::Driver::Get().DestroySemaphore(imported_);
  device_.vk().DestroySemaphore(device_.handle(), timeline_, nullptr);
}

void CudaChannel::Turn(
    const std::function<void(const TimelinePoint&, const TimelinePoint&)>& submit) {
  const cuda::Driver& driver = cuda::Driver::Get();
  const cuda::ExternalSemaphoreParams ready = {.value = value_ + 1};
  driver.Check(driver.SignalSemaphores(&imported_, &ready, 1, stream_),
               "cuSignalExternalSemaphoresAsync");
  value_ = ready.value;
  const cuda::ExternalSemaphoreParams done = {.value = ready.value + 1};
  submit({timeline_, ready.value}, {timeline_, done.value});
  value_ = done.value;
  driver.Check(driver.WaitSemaphores(&imported_, &done, 1, stream_),
               "cuWaitExternalSemaphoresAsync");
}

}  // namespace jax_aat
