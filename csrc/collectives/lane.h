#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "collectives/exchange.h"
#include "collectives/failure.h"

namespace dear {

// A queue of exchanges that run one after another, in the same order on every rank.
class Lane {
 public:
  virtual ~Lane() = default;
  virtual std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                  std::string label) = 0;
  virtual void submit(const std::shared_ptr<Exchange>& exchange) = 0;
  // Makes every exchange in flight and to come fail with `reason`.
  virtual void abort(const std::string& reason) = 0;
  // For a caller to whom a collective that is not ours has failed: who has ended, as far as the lanes of this
  // process know or hear within `patience`. See Peers::investigate().
  virtual std::optional<Failure> investigate(const std::string& phase, const std::string& label,
                                             std::chrono::milliseconds patience) {
    return std::nullopt;
  }
  virtual int rank() const = 0;
  virtual int world() const = 0;
};

}  // namespace dear
