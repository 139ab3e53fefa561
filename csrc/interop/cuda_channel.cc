#include "interop/cuda_channel.h"

#include "vulkan/file_descriptor.h"

namespace jax_aat {

CudaChannel::CudaChannel(const Device& device, cuda::Stream stream)
    : device_(device), stream_(stream), timeline_(device) {
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
  device.Check(device.vk().CreateSemaphore(device.handle(), &info, nullptr, timeline_.out()),
               "vkCreateSemaphore");
  const VkSemaphoreGetFdInfoKHR get = {
      .sType = VK_STRUCTURE_TYPE_SEMAPHORE_GET_FD_INFO_KHR,
      .semaphore = timeline_.get(),
      .handleType = VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_OPAQUE_FD_BIT,
  };
  FileDescriptor fd;
  device.Check(device.vk().GetSemaphoreFdKHR(device.handle(), &get, fd.out()),
               "vkGetSemaphoreFdKHR");
  const cuda::ExternalSemaphoreHandleDesc handle = {
      .handle = {.type = cuda::kTimelineSemaphoreFd, .fd = fd.get()},
  };
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(driver.ImportSemaphore(&imported_, &handle), "cuImportExternalSemaphore");
  fd.Release();
}

CudaChannel::~CudaChannel() { cuda::Driver::Get().DestroySemaphore(imported_); }

void CudaChannel::Turn(
    const std::function<void(const TimelinePoint&, const TimelinePoint&)>& submit) {
  const cuda::Driver& driver = cuda::Driver::Get();
  const cuda::ExternalSemaphoreParams ready = {.value = value_ + 1};
  driver.Check(driver.SignalSemaphores(&imported_, &ready, 1, stream_),
               "cuSignalExternalSemaphoresAsync");
  value_ = ready.value;
  const cuda::ExternalSemaphoreParams done = {.value = ready.value + 1};
  submit({timeline_.get(), ready.value}, {timeline_.get(), done.value});
  value_ = done.value;
  driver.Check(driver.WaitSemaphores(&imported_, &done, 1, stream_),
               "cuWaitExternalSemaphoresAsync");
}

void CudaChannel::WaitOnHost() const {
  // First the queue, which tells when the device is lost; the stream would wait for ever.
  device_.Wait({timeline_.get(), value_});
  const cuda::Driver& driver = cuda::Driver::Get();
  driver.Check(driver.SynchronizeStream(stream_), "cuStreamSynchronize");
}

}  // namespace jax_aat
