// Ownership of a file descriptor until an import takes it over.
#pragma once

#include <unistd.h>

#include <utility>

namespace jax_aat {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  ~FileDescriptor() {
    if (value_ >= 0) close(value_);
  }
  FileDescriptor(FileDescriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&&) = delete;

  int get() const { return value_; }
  // Where a C function writes the new descriptor.
  int* out() { return &value_; }
  // Once an importer owns it.
  void Release() { value_ = -1; }

 private:
  int value_ = -1;
};

}  // namespace jax_aat
