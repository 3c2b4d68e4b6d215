#include "precondition/rank_one.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace dear::precondition {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

// A rectangle as rows of one block, or of several one below the other, each with columns of its own.
struct Shape {
  explicit Shape(const Rectangle& part)
      : columns(part.view.size(-1)),
        rows(columns > 0 ? part.view.numel() / columns : 0),
        block_rows(part.view.size(-2)) {}
  int64_t columns;
  int64_t rows;
  int64_t block_rows;
};

template <typename V>
struct Sums {
  V product;
  V square;
};

template <typename T, typename V>
inline __attribute__((always_inline)) Sums<V> sums_of_any_row(const T* g, const V* a, int64_t n) {
  V product = 0;
  V square = 0;
  DEAR_SIMD_SUM(product, square)
  for (int64_t i = 0; i < n; ++i) {
    const V value = static_cast<V>(g[i]);
    product += value * a[i];
    square += value * value;
  }
  return {product, square};
}

template <typename T, typename V>
inline __attribute__((always_inline)) void subtract_from_any_row(T* g, V w, const V* a, V factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    g[i] = static_cast<T>(factor * static_cast<V>(g[i]) - w * a[i]);
  }
}

// The usual types have vector instructions of their own.
DEAR_CLONES Sums<float> sums_of_floats(const float* g, const float* a, int64_t n) {
  return sums_of_any_row<float, float>(g, a, n);
}
DEAR_CLONES void subtract_from_floats(float* g, float w, const float* a, float factor, int64_t n) {
  subtract_from_any_row<float, float>(g, w, a, factor, n);
}

template <typename T, typename V>
Sums<V> sums_of_row(const T* g, const V* a, int64_t n) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, float>) {
    return sums_of_floats(g, a, n);
  } else {
    return sums_of_any_row<T, V>(g, a, n);
  }
}

template <typename T, typename V>
void subtract_from_row(T* g, V w, const V* a, V factor, int64_t n) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<V, float>) {
    subtract_from_floats(g, w, a, factor, n);
  } else {
    subtract_from_any_row<T, V>(g, w, a, factor, n);
  }
}

template <typename T, typename V>
void add_products_of(const Rectangle& part, const V* a, V* products, V* squares) {
  const Shape shape(part);
  const T* g = part.view.const_data_ptr<T>();
  products += part.row;
  std::vector<V> square(static_cast<size_t>(shape.rows));
  at::parallel_for(0, shape.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.columns)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       if (part.column < 0) {
                         const V value = static_cast<V>(g[row]);
                         products[row] += value;
                         square[row] = value * value;
                         continue;
                       }
                       const V* own = a + part.column + row / shape.block_rows * shape.columns;
                       const auto sums = sums_of_row<T, V>(g + row * shape.columns, own, shape.columns);
                       products[row] += sums.product;
                       square[row] = sums.square;
                     }
                   });
  V total = 0;  // in the order of the rows, however many threads there are
  for (const V each : square) {
    total += each;
  }
  squares[part.layer] += total;
}

template <typename T, typename V>
void subtract_from(const Rectangle& part, const V* w, const V* a, V factor) {
  const Shape shape(part);
  T* g = part.view.mutable_data_ptr<T>();
  w += part.row;
  at::parallel_for(0, shape.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.columns)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       if (part.column < 0) {
                         g[row] = static_cast<T>(factor * static_cast<V>(g[row]) - w[row]);
                         continue;
                       }
                       const V* own = a + part.column + row / shape.block_rows * shape.columns;
                       subtract_from_row(g + row * shape.columns, w[row], own, factor, shape.columns);
                     }
                   });
}

void check(const std::vector<Rectangle>& parts, const at::Tensor& rows, const at::Tensor& columns) {
  TORCH_CHECK_VALUE(rows.is_contiguous() && columns.is_contiguous() &&
                        rows.scalar_type() == columns.scalar_type() && rows.device().is_cpu(),
                    "the vectors must be packed host tensors of one type: pass those of eva_parts.Vectors.");
  for (const auto& part : parts) {
    TORCH_CHECK_VALUE(part.view.is_contiguous() && part.view.device().is_cpu() && part.view.dim() >= 2,
                      "the parts must be packed host matrices: pass those of eva_parts.cut_weight().");
    const Shape shape(part);
    const int64_t width = shape.rows == 0 ? 0 : shape.rows / shape.block_rows * shape.columns;
    TORCH_CHECK_VALUE(part.row >= 0 && part.row + shape.rows <= rows.numel() &&
                          (part.column < 0 ? shape.columns == 1 : part.column + width <= columns.numel()),
                      "a part lies outside of the vectors: pass the vectors of these layers.");
  }
}

// Two flat vectors of one type, in so many parts one after another.
void check_flat(const at::Tensor& x, const at::Tensor& y, const std::vector<int64_t>& first, size_t parts) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel() &&
                        x.scalar_type() == y.scalar_type() && first.size() == parts + 1 &&
                        first.front() == 0 && first.back() == x.numel() &&
                        std::is_sorted(first.begin(), first.end()),
                    "the vectors must be packed, of one type, and in as many parts as there are layers.");
}

// [outer, n, inner] to [outer, size, inner]: each element of a window, summed over the windows.
template <typename V>
std::vector<V> sum_along(const std::vector<V>& image, int64_t n, int64_t inner, const Windows& windows) {
  const int64_t outer = n * inner == 0 ? 0 : static_cast<int64_t>(image.size()) / (n * inner);
  std::vector<V> sums(static_cast<size_t>(outer * windows.size * inner));
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t k = 0; k < windows.size; ++k) {
      V* sum = sums.data() + (o * windows.size + k) * inner;
      const int64_t first = k * windows.step - windows.before;
      for (int64_t p = 0; p < windows.count; ++p) {
        const int64_t at = first + p * windows.stride;
        if (at < 0 || at >= n) {
          continue;
        }
        const V* values = image.data() + (o * n + at) * inner;
        for (int64_t i = 0; i < inner; ++i) {
          sum[i] += values[i];
        }
      }
    }
  }
  return sums;
}

}  // namespace

void add_products(const std::vector<Rectangle>& parts, const at::Tensor& a, const at::Tensor& products,
                  const at::Tensor& squares) {
  check(parts, products, a);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "add_products", [&] {
    using V = scalar_t;
    for (const auto& part : parts) {
      TORCH_CHECK_VALUE(part.layer >= 0 && part.layer < squares.numel(), "a part is of no layer.");
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, part.view.scalar_type(), "add_products", [&] {
        add_products_of<scalar_t, V>(part, a.const_data_ptr<V>(), products.mutable_data_ptr<V>(),
                                     squares.mutable_data_ptr<V>());
      });
    }
  });
}

void subtract(const std::vector<Rectangle>& parts, const at::Tensor& w, const at::Tensor& a, double factor) {
  check(parts, w, a);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "subtract", [&] {
    using V = scalar_t;
    for (const auto& part : parts) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, part.view.scalar_type(), "subtract", [&] {
        subtract_from<scalar_t, V>(part, w.const_data_ptr<V>(), a.const_data_ptr<V>(),
                                   static_cast<V>(factor));
      });
    }
  });
}

void update_means(const Means& running, const at::Tensor& known, const at::Tensor& used, const Means& step,
                  const std::vector<int64_t>& first_column, const std::vector<int64_t>& first_row,
                  double decay) {
  const auto layers = static_cast<size_t>(known.numel());
  const bool with_rows = running.rows.numel() > 0;
  check_flat(running.columns, step.columns, first_column, layers);
  if (with_rows) {
    check_flat(running.rows, step.rows, first_row, layers);
  }
  AT_DISPATCH_FLOATING_TYPES(known.scalar_type(), "update_means", [&] {
    auto* knows = known.mutable_data_ptr<scalar_t>();
    const auto* uses = used.const_data_ptr<scalar_t>();
    const auto follow = [](const at::Tensor& mean, const at::Tensor& now, int64_t begin, int64_t end,
                           scalar_t divisor, scalar_t share) {
      auto* values = mean.mutable_data_ptr<scalar_t>();
      const auto* news = now.const_data_ptr<scalar_t>();
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t value = news[i] / divisor;
        values[i] += share * ((std::isfinite(value) ? value : scalar_t(0)) - values[i]);
      }
    };
    for (size_t layer = 0; layer < layers; ++layer) {
      if (!(uses[layer] > 0)) {
        continue;
      }
      const auto share = static_cast<scalar_t>(1 - decay * knows[layer]);
      knows[layer] = 1;
      follow(running.columns, step.columns, first_column[layer], first_column[layer + 1], uses[layer], share);
      if (with_rows) {
        follow(running.rows, step.rows, first_row[layer], first_row[layer + 1], scalar_t(1), share);
      }
    }
  });
}

at::Tensor dot_by_block(const at::Tensor& x, const at::Tensor& y, const std::vector<int64_t>& first) {
  TORCH_CHECK_VALUE(!first.empty(), "the end of the last block is missing.");
  const size_t blocks = first.size() - 1;
  check_flat(x, y, first, blocks);
  at::Tensor sums = at::empty({static_cast<int64_t>(blocks)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dot_by_block", [&] {
    const auto* a = x.const_data_ptr<scalar_t>();
    const auto* b = y.const_data_ptr<scalar_t>();
    auto* sum = sums.mutable_data_ptr<scalar_t>();
    for (size_t block = 0; block < blocks; ++block) {
      const int64_t begin = first[block];
      sum[block] = sums_of_row<scalar_t, scalar_t>(a + begin, b + begin, first[block + 1] - begin).product;
    }
  });
  return sums;
}

Eva eva_correction(const EvaTerms& terms) {
  const size_t layers = terms.has_bias.size();
  const size_t blocks = terms.first_block.empty() ? 0 : static_cast<size_t>(terms.first_block.back());
  check_flat(terms.columns, terms.columns, terms.first_column, blocks);
  check_flat(terms.rows, terms.rows, terms.first_row, blocks);
  check_flat(terms.inner, terms.inner, terms.first_block, layers);
  TORCH_CHECK_VALUE(terms.squares.numel() == static_cast<int64_t>(layers) &&
                        terms.learning_rates.size() == layers && terms.squares.is_contiguous(),
                    "there must be one number for each layer.");
  Eva result{at::empty_like(terms.rows), 0.0};
  AT_DISPATCH_FLOATING_TYPES(terms.rows.scalar_type(), "eva_correction", [&] {
    const auto* a = terms.columns.const_data_ptr<scalar_t>();
    const auto* b = terms.rows.const_data_ptr<scalar_t>();
    const auto* inner = terms.inner.const_data_ptr<scalar_t>();
    const auto* squares = terms.squares.const_data_ptr<scalar_t>();
    std::vector<double> scale(blocks);
    double before = 0, removed = 0, outer = 0, change = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
      double own = 0, of_w = 0;  // ⟨w aᵀ, G⟩, ‖w aᵀ‖²
      for (auto block = static_cast<size_t>(terms.first_block[layer]);
           block < static_cast<size_t>(terms.first_block[layer + 1]); ++block) {
        const int64_t column = terms.first_column[block], row = terms.first_row[block];
        const double of_a =
            sums_of_row<scalar_t, scalar_t>(a + column, a + column, terms.first_column[block + 1] - column)
                .square +
            (terms.has_bias[layer] ? 1.0 : 0.0);
        const double of_b =
            sums_of_row<scalar_t, scalar_t>(b + row, b + row, terms.first_row[block + 1] - row).square;
        scale[block] = inner[block] / (of_a * of_b + terms.damping);
        own += scale[block] * inner[block];
        of_w += scale[block] * scale[block] * of_a * of_b;
      }
      if (!std::isfinite(squares[layer] - own))
        continue;  // GradScaler skips its optimizer's step, no other's
      outer += of_w;
      before += squares[layer];
      removed += own;
      change += terms.learning_rates[layer] * terms.learning_rates[layer] * (squares[layer] - own);
    }
    constexpr double tiny = std::numeric_limits<scalar_t>::min();
    if (terms.kl_clip) {
      const double ratio = std::sqrt(*terms.kl_clip * terms.damping / (change < tiny ? tiny : change));
      result.factor = (ratio > 1 ? 1.0 : ratio) / terms.damping;
    } else {
      const double after = before - 2 * removed + outer;
      result.factor = std::sqrt(before / (after < tiny ? tiny : after));
    }
    auto* w = result.rows.mutable_data_ptr<scalar_t>();
    for (size_t block = 0; block < blocks; ++block) {
      const auto times = static_cast<scalar_t>(scale[block] * result.factor);
      for (int64_t row = terms.first_row[block]; row < terms.first_row[block + 1]; ++row) {
        w[row] = times * b[row];
      }
    }
  });
  return result;
}

at::Tensor finite_message(const std::vector<double>& flags, const std::vector<at::Tensor>& parts) {
  TORCH_CHECK_VALUE(!parts.empty(), "a message has a part at least.");
  auto numel = static_cast<int64_t>(flags.size());
  for (const auto& part : parts) {
    TORCH_CHECK_VALUE(
        part.device().is_cpu() && part.is_contiguous() && part.scalar_type() == parts[0].scalar_type(),
        "the parts must be packed host tensors of one type.");
    numel += part.numel();
  }
  at::Tensor message = at::empty({numel}, parts[0].options());
  AT_DISPATCH_FLOATING_TYPES(message.scalar_type(), "finite_message", [&] {
    auto* begin = message.mutable_data_ptr<scalar_t>();
    auto* next = std::transform(flags.begin(), flags.end(), begin,
                                [](double flag) { return static_cast<scalar_t>(flag); });
    for (const auto& part : parts) {
      next = std::copy_n(part.const_data_ptr<scalar_t>(), part.numel(), next);
    }
    if (!std::all_of(begin, next, [](scalar_t each) { return std::isfinite(each); })) {
      std::fill(begin, next, scalar_t(0));
    }
  });
  return message;
}

at::Tensor mean_of_windows(const at::Tensor& image, const std::vector<Windows>& windows) {
  TORCH_CHECK_VALUE(
      image.device().is_cpu() && image.is_contiguous() &&
          image.dim() == static_cast<int64_t>(windows.size()) + 1,
      "the image must be a packed host tensor [channels, sizes ...], with windows on each size.");
  at::Tensor result;
  AT_DISPATCH_FLOATING_TYPES(image.scalar_type(), "mean_of_windows", [&] {
    const auto* begin = image.const_data_ptr<scalar_t>();
    std::vector<scalar_t> values(begin, begin + image.numel());
    int64_t inner = 1;
    double count = 1;
    for (size_t dim = windows.size(); dim-- > 0;) {
      values = sum_along(values, image.size(static_cast<int64_t>(dim) + 1), inner, windows[dim]);
      inner *= windows[dim].size;
      count *= static_cast<double>(windows[dim].count);
    }
    result = at::empty({static_cast<int64_t>(values.size())}, image.options());
    std::transform(values.begin(), values.end(), result.mutable_data_ptr<scalar_t>(),
                   [count](scalar_t each) { return static_cast<scalar_t>(each / count); });
  });
  return result;
}

}  // namespace dear::precondition
