// csr_attention, vectorised: one query's entries at a time, on the rows of K and V that they name.
//
// Two passes over many queries, first on the keys and then on the values, so that each has the L1 cache for itself.
// Within the first, a few queries' scores are exponentiated in one stream: exp's long dependency chains then overlap
// with nothing that waits for them. A sparse row's accesses are too irregular for the hardware to foresee, so each pass
// prefetches into the L2 cache what the next one reads. Threads split the work by entries; where the weights' gradient
// is wanted they split the pattern's rows and run the batch inside, so that it needs no atomics.
#include "kernels/cpu/attention_simd.h"
#include "kernels/cpu/sparse_rows.h"
#include "kernels/cpu/tables.h"
#include "kernels/philox.h"

namespace fiak::cpu::FIAK_ISA {
namespace {

constexpr int64_t kRowCost = 16;             // what a row costs beside its entries, in entries
constexpr int64_t kScoreBuffer = 64 * 1024;  // floats of scores between the two passes, which stay in the L2 cache
constexpr int64_t kQueriesAtOnce = 8;        // queries whose scores are exponentiated in one go, in the L1 cache
constexpr int64_t kPrefetchedQueries = 4;    // how many queries ahead their rows and the output's are fetched

/// The first place in ascending index[0, count) whose value is at least `bound`.
int64_t lower_bound(const uint16_t* index, int64_t count, int64_t bound) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (index[middle] < bound) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

/// use(first, index, count, entry) for each run of a pattern row's entries whose columns are first + index[i] < keys.
template <class Use>
FIAK_INLINE void for_row_segments(const PlanView& plan, int64_t row, int64_t keys, Use&& use) {
  const int64_t* segment = plan.row_segments + row * plan.key_blocks;
  for (int64_t block = 0; block < plan.key_blocks; ++block) {
    const int64_t first = block * kPlanBlock;
    const uint16_t* index = plan.columns + segment[block];
    int64_t count = segment[block + 1] - segment[block];
    if (keys < plan.num_keys && keys - first < kPlanBlock) {
      count = keys > first ? lower_bound(index, count, keys - first) : 0;
    }
    if (count > 0) use(first, index, count, segment[block]);
  }
}

/// use(first, index, count, place) for each run of a pattern column's rows first + index[i] in [begin, end).
template <class Use>
FIAK_INLINE void for_column_segments(const PlanView& plan, int64_t column, int64_t begin, int64_t end, Use&& use) {
  const int64_t* segment = plan.column_segments + column * plan.query_blocks;
  for (int64_t block = 0; block < plan.query_blocks; ++block) {
    const int64_t first = block * kPlanBlock;
    int64_t from = segment[block], to = segment[block + 1];
    if (begin > 0 || end < plan.num_queries) {
      const uint16_t* index = plan.rows + from;
      const int64_t count = to - from;
      to = from + lower_bound(index, count, end - first);
      from = from + lower_bound(index, count, begin - first);
    }
    if (from < to) use(first, plan.rows + from, to - from, from);
  }
}

int64_t longest_row(const PlanView& plan, int64_t begin, int64_t end) {
  int64_t longest = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* segment = plan.row_segments + row * plan.key_blocks;
    longest = larger(longest, segment[plan.key_blocks] - segment[0]);
  }
  return longest;
}

int64_t offset_of(const CsrArgs& args, int64_t b) { return args.query_offsets != nullptr ? args.query_offsets[b] : 0; }

bool in_support(float w) { return !(w <= 0); }  // true for NaN, which must reach its row

/// Copies the entries of the support: a pruned weight's key and value rows must not be touched.
int64_t pick_support(const float* values, const uint16_t* index, int64_t count, uint16_t* picked, float* weights) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    picked[kept] = index[i];
    weights[kept] = values[i];
    kept += in_support(values[i]);
  }
  return kept;
}

/// Pattern rows [begin, end) of query head h for batch element b. `next_key` is the first row of the keys that the
/// caller comes to next, or null.
void forward_rows(const CsrArgs& args, const ForwardResult& result, int64_t b, int64_t h, int64_t begin, int64_t end,
                  int64_t longest, const char* next_key) {
  const int64_t head = b % (args.plan.heads / args.query_heads) * args.query_heads + h;
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b), offset = offset_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size);
  const int64_t room = padded(longest) + kLanes;
  const int64_t pass_rows = larger(1, smaller(end - begin, kScoreBuffer / room));
  const auto* values = static_cast<const float*>(args.values);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{static_cast<char*>(thread_scratch(carved(head_size) + carved(value_size) + carved(pass_rows * room) +
                                                   3 * carved(pass_rows) + 2 * carved(room) + carved(keys) +
                                                   carved(keys * head_size) + carved(keys * value_size)))};
  float* query = scratch.floats(head_size);
  float* sum = scratch.floats(value_size);
  float* scores = scratch.floats(pass_rows * room);
  auto* counts = reinterpret_cast<int32_t*>(scratch.floats(pass_rows));
  float* maxima = scratch.floats(pass_rows);
  float* totals = scratch.floats(pass_rows);
  float* weights = scratch.floats(room);
  auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(room));
  float* bias = scratch.floats(keys);
  const Panel key =
      pack_panel(args.key, args.dtype, b, key_head, keys, args.head_size, scratch.floats(keys * head_size));
  float* value_scratch = scratch.floats(keys * value_size);
  Panel value{};
  if (gaussian) gaussian_bias(args, key, keys, bias);
  const char* first_value = row_address(args.value, args.dtype, b, key_head, 0);
  const int64_t element = element_size(args.dtype);

  // use(first, index, count): the support of a pattern row; weights only where there are values.
  const auto for_support = [&](int64_t row, auto&& use) __attribute__((always_inline)) {
    for_row_segments(args.plan, head * args.plan.num_queries + row, keys,
                     [&](int64_t first, const uint16_t* index, int64_t count, int64_t entry) {
                       if (values == nullptr) return use(first, index, count);
                       count = pick_support(values + entry, index, count, picked, weights);
                       if (count > 0) use(first, picked, count);
                     });
  };

  for (int64_t pass = begin; pass < end; pass += pass_rows) {
    const int64_t rows = smaller(pass_rows, end - pass);
    for (int64_t group = 0; group < rows; group += kQueriesAtOnce) {
      const int64_t group_end = smaller(rows, group + kQueriesAtOnce);
      for (int64_t i = group; i < group_end; ++i) {
        float* s = scores + i * room;
        if (const int64_t j = pass + i - begin; j < keys) {
          prefetch_row(first_value + j * args.value.row_stride * element, args.value_size * element);
        }
        const char* query_row = row_address(args.query, args.dtype, b, h, pass + i - offset);
        if (pass + i + kPrefetchedQueries < end) {
          prefetch_row(query_row + kPrefetchedQueries * args.query.row_stride * element, args.head_size * element);
        }
        load_row(query_row, args.dtype, args.head_size, static_cast<float>(args.scale), query);
        int64_t total = 0;
        for_support(pass + i, [&](int64_t first, const uint16_t* index, int64_t count) {
          dots(query, key.row(first), key.stride, head_size, index, count, s + total);
          if (gaussian) {
            for (int64_t e = 0; e < count; ++e) s[total + e] += bias[first + index[e]];
          }
          total += count;
        });
        for (int64_t e = total; e < padded(total); ++e) s[e] = -kInfinity;
        counts[i] = static_cast<int32_t>(total);
        maxima[i] = row_maximum(s, total);
      }
      for (int64_t i = group; i < group_end; ++i) totals[i] = exp_row(scores + i * room, counts[i], maxima[i]);
    }
    if (pass == begin) {
      value = pack_panel(args.value, args.dtype, b, key_head, keys, args.value_size, value_scratch);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = pass + i;
      float* p = scores + i * room;
      if (const int64_t j = row - begin; next_key != nullptr && j < args.keys) {
        prefetch_row(next_key + j * args.key.row_stride * element, args.head_size * element);
      }
      if (const int64_t ahead = row + kPrefetchedQueries; ahead < end) {
        prefetch_row_for_writing(row_address(result.output, args.dtype, b, h, ahead - offset),
                                 args.value_size * element);
      }
      if (values != nullptr) {
        int64_t done = 0;
        totals[i] = 0;
        for_support(row, [&](int64_t, const uint16_t*, int64_t count) {
          for (int64_t e = 0; e < count; ++e) totals[i] += p[done + e] *= weights[e];
          done += count;
        });
      }
      if (dropout.active()) {
        int64_t done = 0;
        for_support(row, [&](int64_t first, const uint16_t* index, int64_t count) {
          for (int64_t e = 0; e < count; ++e) {
            p[done + e] *= static_cast<float>(dropout.factor(b, h, row, first + index[e]));
          }
          done += count;
        });
      }
      for (int64_t d = 0; d < value_size; d += kLanes) store(sum + d, zero());
      int64_t done = 0;
      for_support(row, [&](int64_t first, const uint16_t* index, int64_t count) {
        weighted_sum(p + done, value.row(first), value.stride, value_size, index, count, sum);
        done += count;
      });
      // A NaN or infinite weight makes its row NaN.
      const float total = totals[i] < kInfinity ? totals[i] : kNaN;
      const int64_t n = row - offset;
      store_row(sum, args.dtype, args.value_size, counts[i] > 0 ? 1.0f / total : 0.0f,
                row_address(result.output, args.dtype, b, h, n));
      static_cast<float*>(result.logsumexp)[(b * args.query_heads + h) * args.queries + n] =
          counts[i] > 0 ? maxima[i] + __builtin_logf(total) : -kInfinity;
    }
  }
}

/// Backward for pattern rows [begin, end) of query head h: dQ, and added onto the weights' gradient.
void backward_rows(const CsrArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t h,
                   int64_t begin, int64_t end, int64_t longest) {
  const int64_t head = b % (args.plan.heads / args.query_heads) * args.query_heads + h;
  const int64_t key_head = h / shared_heads(args), keys = keys_of(args, b), offset = offset_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size);
  const int64_t room = padded(longest) + kLanes;
  const auto* values = static_cast<const float*>(args.values);
  auto* grad_values = static_cast<float*>(grads.grad_weight);
  const bool gaussian = args.score == Score::kGaussian;
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{
      static_cast<char*>(thread_scratch(2 * carved(head_size) + carved(value_size) + 3 * carved(room) + carved(keys) +
                                        carved(keys * head_size) + carved(keys * value_size)))};
  float* query = scratch.floats(head_size);
  float* sum = scratch.floats(head_size);
  float* grad_output = scratch.floats(value_size);
  float* scores = scratch.floats(room);
  float* products = scratch.floats(room);
  auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(room));
  float* bias = scratch.floats(keys);
  const Panel key =
      pack_panel(args.key, args.dtype, b, key_head, keys, args.head_size, scratch.floats(keys * head_size));
  const Panel value =
      pack_panel(args.value, args.dtype, b, key_head, keys, args.value_size, scratch.floats(keys * value_size));
  if (gaussian) gaussian_bias(args, key, keys, bias);

  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row - offset, at = (b * args.query_heads + h) * args.queries + n;
    const float lse = static_cast<const float*>(grads.logsumexp)[at], row_delta = delta[at];
    for (int64_t d = 0; d < head_size; d += kLanes) store(sum + d, zero());
    if (lse != -kInfinity) {
      load_row(row_address(args.query, args.dtype, b, h, n), args.dtype, args.head_size, static_cast<float>(args.scale),
               query);
      load_row(row_address(grads.grad_output, args.dtype, b, h, n), args.dtype, args.value_size, 1.0f, grad_output);
      for_row_segments(args.plan, head * args.plan.num_queries + row, keys,
                       [&](int64_t first, const uint16_t* index, int64_t count, int64_t entry) {
                         dots(query, key.row(first), key.stride, head_size, index, count, scores);
                         dots(grad_output, value.row(first), value.stride, value_size, index, count, products);
                         if (gaussian) {
                           for (int64_t e = 0; e < count; ++e) scores[e] += bias[first + index[e]];
                         }
                         if (dropout.active()) {
                           for (int64_t e = 0; e < count; ++e) {
                             products[e] *= static_cast<float>(dropout.factor(b, h, row, first + index[e]));
                           }
                         }
                         exp_row(scores, count, lse);
                         for (int64_t e = 0; e < count; ++e) scores[e] *= products[e] - row_delta;
                         if (grad_values != nullptr) {
                           for (int64_t e = 0; e < count; ++e) grad_values[entry + e] += scores[e];
                         }
                         if (values != nullptr) {
                           for (int64_t e = 0; e < count; ++e) products[e] = scores[e] * values[entry + e];
                           int64_t kept = 0;
                           for (int64_t e = 0; e < count; ++e) {
                             picked[kept] = index[e];
                             scores[kept] = products[e];
                             kept += in_support(values[entry + e]);
                           }
                           index = picked;
                           count = kept;
                         }
                         weighted_sum(scores, key.row(first), key.stride, head_size, index, count, sum);
                       });
    }
    if (grads.grad_query.data != nullptr) {
      store_row(sum, args.dtype, args.head_size, static_cast<float>(args.scale),
                row_address(grads.grad_query, args.dtype, b, h, n));
    }
  }
}

/// Backward for keys [begin, end) of one key head: dK and dV, summed over the query heads that read it.
void backward_columns(const CsrArgs& args, const BackwardArgs& grads, const float* delta, int64_t b, int64_t key_head,
                      int64_t begin, int64_t end, int64_t longest) {
  const PlanView& plan = args.plan;
  const int64_t first_head = b % (plan.heads / args.query_heads) * args.query_heads;
  const int64_t heads = shared_heads(args), keys = keys_of(args, b), offset = offset_of(args, b);
  const int64_t head_size = padded(args.head_size), value_size = padded(args.value_size), queries = args.queries;
  const int64_t room = padded(longest) + kLanes;
  const auto* values = static_cast<const float*>(args.values);
  const float scale = static_cast<float>(args.scale);
  const Dropout dropout = make_dropout(args.dropout_p, args.seed);

  Carver scratch{static_cast<char*>(
      thread_scratch(2 * carved(head_size) + 2 * carved(value_size) + 4 * carved(room) + 2 * carved(heads * 4) +
                     heads * (carved(queries * head_size) + carved(queries * value_size))))};
  float* key = scratch.floats(head_size);
  float* key_sum = scratch.floats(head_size);
  float* value = scratch.floats(value_size);
  float* value_sum = scratch.floats(value_size);
  float* attention = scratch.floats(room);
  float* products = scratch.floats(room);
  float* weights = scratch.floats(room);
  auto* picked = reinterpret_cast<uint16_t*>(scratch.floats(room));
  static_assert(sizeof(Panel) <= 4 * sizeof(float), "two panels a head are carved below");
  auto* query_panels = reinterpret_cast<Panel*>(scratch.floats(heads * 4));
  auto* output_panels = reinterpret_cast<Panel*>(scratch.floats(heads * 4));
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t h = key_head * heads + i;
    query_panels[i] =
        pack_panel(args.query, args.dtype, b, h, queries, args.head_size, scratch.floats(queries * head_size));
    output_panels[i] =
        pack_panel(grads.grad_output, args.dtype, b, h, queries, args.value_size, scratch.floats(queries * value_size));
  }

  for (int64_t j = begin; j < end; ++j) {
    for (int64_t d = 0; d < head_size; d += kLanes) store(key_sum + d, zero());
    for (int64_t d = 0; d < value_size; d += kLanes) store(value_sum + d, zero());
    if (j < keys) {
      load_row(row_address(args.key, args.dtype, b, key_head, j), args.dtype, args.head_size, scale, key);
      load_row(row_address(args.value, args.dtype, b, key_head, j), args.dtype, args.value_size, 1.0f, value);
      // |k|^2 comes from the scaled key: -scale/2 |k|^2 = -|scale k|^2 / (2 scale), and 0 where scale is.
      const float bias = args.score == Score::kGaussian && scale != 0 ? -0.5f / scale * dot(key, key, head_size) : 0.0f;
      float score_sum = 0;
      bool any = false;
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t h = key_head * heads + i, head = first_head + h;
        const Panel &query = query_panels[i], &grad_output = output_panels[i];
        const int64_t at = (b * args.query_heads + h) * queries;
        const float* lse = static_cast<const float*>(grads.logsumexp) + at;
        const float* row_delta = delta + at;
        const float* head_values =
            values != nullptr ? values + plan.row_segments[head * plan.num_queries * plan.key_blocks] : nullptr;
        for_column_segments(
            plan, head * plan.num_keys + j, offset, offset + queries,
            [&](int64_t first, const uint16_t* index, int64_t count, int64_t place) {
              if (head_values != nullptr) {
                int64_t kept = 0;
                for (int64_t e = 0; e < count; ++e) {
                  const float w = head_values[plan.positions[place + e]];
                  picked[kept] = index[e];
                  weights[kept] = w;
                  kept += in_support(w) && lse[first - offset + index[e]] != -kInfinity;
                }
                index = picked;
                count = kept;
                if (count == 0) return;
              }
              any = true;
              const float* queries_at = query.row(first - offset);
              const float* outputs_at = grad_output.row(first - offset);
              dots(key, queries_at, query.stride, head_size, index, count, attention);
              dots(value, outputs_at, grad_output.stride, value_size, index, count, products);
              for (int64_t e = 0; e < count; ++e) attention[e] += bias - lse[first - offset + index[e]];
              exp_row(attention, count, 0.0f);
              if (head_values != nullptr) {
                for (int64_t e = 0; e < count; ++e) attention[e] *= weights[e];
              }
              if (!dropout.active()) {
                weighted_sum(attention, outputs_at, grad_output.stride, value_size, index, count, value_sum);
                for (int64_t e = 0; e < count; ++e)
                  products[e] = attention[e] * (products[e] - row_delta[first - offset + index[e]]);
              } else {
                for (int64_t e = 0; e < count; ++e) {
                  const auto kept = static_cast<float>(dropout.factor(b, h, first + index[e], j));
                  products[e] = attention[e] * (kept * products[e] - row_delta[first - offset + index[e]]);
                  attention[e] *= kept;
                }
                weighted_sum(attention, outputs_at, grad_output.stride, value_size, index, count, value_sum);
              }
              weighted_sum(products, queries_at, query.stride, head_size, index, count, key_sum);
              for (int64_t e = 0; e < count; ++e) score_sum += products[e];
            });
      }
      if (args.score == Score::kGaussian && any && scale != 0) {
        // d s_ij / d k_j = scale (q_i - k_j), and `key` holds scale k_j.
        for (int64_t d = 0; d < head_size; ++d) key_sum[d] -= score_sum * (key[d] / scale);
      }
    }
    if (grads.grad_key.data != nullptr) {
      store_row(key_sum, args.dtype, args.head_size, scale, row_address(grads.grad_key, args.dtype, b, key_head, j));
    }
    if (grads.grad_value.data != nullptr) {
      store_row(value_sum, args.dtype, args.value_size, 1.0f,
                row_address(grads.grad_value, args.dtype, b, key_head, j));
    }
  }
}

/// rows(b, h, begin, end, longest, next b, next h) over the pattern rows of all queries, split by entries. Batch
/// elements are outside: the heads of one often lie side by side. There is no next where next b is the batch's size.
template <class Rows>
void for_batch_rows(const CsrArgs& args, const Parallel& parallel, Rows&& rows) {
  const PlanView& plan = args.plan;
  const int64_t groups = plan.heads / args.query_heads, pattern_rows = plan.heads * plan.num_queries;
  // Rows that only some elements use are not worth a search for balance.
  const bool whole = args.query_offsets == nullptr && args.queries == plan.num_queries;
  const auto work = [&](int64_t unit) {
    if (!whole) return unit;
    return unit / pattern_rows * plan.nnz + plan.row_segments[unit % pattern_rows * plan.key_blocks] + kRowCost * unit;
  };
  parallel_balanced(parallel, args.batch * args.query_heads * args.queries, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / args.queries, b = i / args.query_heads, h = i % args.query_heads;
      const int64_t first = i * args.queries, stop = smaller(end, first + args.queries);
      const int64_t offset = offset_of(args, b), from = begin - first + offset, to = stop - first + offset;
      const int64_t head_row = (b % groups * args.query_heads + h) * plan.num_queries;
      const int64_t next = stop < end ? i + 1 : args.batch * args.query_heads;
      rows(b, h, from, to, longest_row(plan, head_row + from, head_row + to), next / args.query_heads,
           next % args.query_heads);
      begin = stop;
    }
  });
}

/// rows(b, h, begin, end, longest) over all pattern rows that the batch uses, split by the pattern's entries: a thread
/// alone has a row of the pattern, for the whole batch.
template <class Rows>
void for_pattern_rows(const CsrArgs& args, const Parallel& parallel, Rows&& rows) {
  const PlanView& plan = args.plan;
  const int64_t groups = plan.heads / args.query_heads;
  const auto work = [&](int64_t row) { return plan.row_segments[row * plan.key_blocks] + kRowCost * row; };
  parallel_balanced(parallel, plan.heads * plan.num_queries, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t head = begin / plan.num_queries, first = head * plan.num_queries;
      const int64_t stop = smaller(end, first + plan.num_queries), longest = longest_row(plan, begin, stop);
      for (int64_t b = head / args.query_heads; b < args.batch; b += groups) {
        const int64_t offset = offset_of(args, b);
        const int64_t from = larger(begin - first, offset), to = smaller(stop - first, offset + args.queries);
        if (from < to) rows(b, head % args.query_heads, from, to, longest);
      }
      begin = stop;
    }
  });
}

}  // namespace

void csr_forward(const CsrArgs& args, const ForwardResult& result, const Parallel& parallel) {
  for_batch_rows(
      args, parallel,
      [&](int64_t b, int64_t h, int64_t begin, int64_t end, int64_t longest, int64_t next_b, int64_t next_h) {
        const char* next_key =
            next_b < args.batch ? row_address(args.key, args.dtype, next_b, next_h / shared_heads(args), 0) : nullptr;
        forward_rows(args, result, b, h, begin, end, longest, next_key);
      });
}

void csr_backward(const CsrArgs& args, const BackwardArgs& grads, const Parallel& parallel) {
  const PlanView& plan = args.plan;
  const SharedScratch shared(args.batch * args.query_heads * args.queries * sizeof(float));
  auto* delta = static_cast<float*>(shared.data());
  compute_delta(args, grads, parallel, delta);

  if (grads.grad_weight != nullptr) std::memset(grads.grad_weight, 0, plan.nnz * sizeof(float));
  const auto rows = [&](int64_t b, int64_t h, int64_t begin, int64_t end, int64_t longest, auto...) {
    backward_rows(args, grads, delta, b, h, begin, end, longest);
  };
  if (grads.grad_weight != nullptr) {
    for_pattern_rows(args, parallel, rows);
  } else if (grads.grad_query.data != nullptr) {
    for_batch_rows(args, parallel, rows);
  }

  if (grads.grad_key.data != nullptr || grads.grad_value.data != nullptr) {
    const int64_t heads = shared_heads(args), groups = plan.heads / larger(1, args.query_heads);
    const auto segment = [&](int64_t head, int64_t j) {
      return plan.column_segments[(head * plan.num_keys + j) * plan.query_blocks];
    };
    // A unit is a key of a key head; its entries are those of all query heads that read it.
    const auto work = [&](int64_t unit) {
      const int64_t head = unit / plan.num_keys * heads, j = unit % plan.num_keys;
      int64_t entries = segment(head, 0) + kRowCost * unit;
      for (int64_t i = 0; i < heads && j > 0; ++i) entries += segment(head + i, j) - segment(head + i, 0);
      return entries;
    };
    parallel_balanced(parallel, groups * args.key_heads * plan.num_keys, work, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t unit = begin / plan.num_keys, first = unit * plan.num_keys;
        const int64_t stop = smaller(end, first + plan.num_keys);
        int64_t longest = 0;
        for (int64_t i = 0; i < heads; ++i) {
          for (int64_t j = begin - first; j < stop - first; ++j) {
            longest = larger(longest, segment(unit * heads + i, j + 1) - segment(unit * heads + i, j));
          }
        }
        for (int64_t b = unit / args.key_heads; b < args.batch; b += groups) {
          backward_columns(args, grads, delta, b, unit % args.key_heads, begin - first, stop - first, longest);
        }
        begin = stop;
      }
    });
  }
}

}  // namespace fiak::cpu::FIAK_ISA
