#pragma once

#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>
#include <vector>

#include "schedule/bucket.h"

namespace dear {

// Note [Waited for elsewhere]
// A wait on a GPU orders the stream of whoever waits, once: what was waited for is not pending any more, and
// nobody waits for it again. So where it is first touched on another stream than that of training (a running
// mean of the parameters, gradients that are logged), the stream of training waits, too, and first: what it
// does next reads the same memory, as it may under plain DDP, where such a reader changes nothing for it.
class HomeStream {
 public:
  // The caller's stream, on the device of these buckets, is that of training. Nothing on a host.
  void note(const std::vector<Bucket>& buckets) {
    if (buckets.empty() || buckets.front().buffer.is_cpu()) return;
    const at::Device device = buckets.front().buffer.device();
    stream_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  }

  // Waits on the caller's stream, and first on that of training where this is another one.
  template <typename Wait>
  void wait_with(const Wait& wait) const {
    if (stream_ &&
        c10::impl::VirtualGuardImpl(stream_->device_type()).getStream(stream_->device()) != *stream_) {
      const c10::StreamGuard on(*stream_);
      wait();
    }
    wait();
  }

 private:
  std::optional<c10::Stream> stream_;
};

}  // namespace dear
