// Device code of csr_attention by entries, for patterns that keep few pairs: a warp for each row of the pattern, or for
// each of its columns in backward's second half. A warp decodes its indices once and serves several samples with
// them. No shared memory, no barriers, no atomics: the order of all sums is fixed. Keeps to what both nvcc and
// csrc/simt compile.
//
// A warp takes 32 entries at a time, a round; each lane knows one of them. kHead / 16 lanes, a team, read a row of K
// together: each takes 16 columns, in pieces of 16 bytes beside those of its neighbours. The teams multiply different
// rows, the entries that their own lanes know, one step after the other. With the scores of a round each lane computes
// the probability of its entry, for the teams to spread in as many steps over rows of V. What the teams summed is
// added up in the end. Scores are as in attention_common.cuh; a weight joins its score as log2(w).
//
//   fiak_csr_entries_forward_T_dD_eE(CsrForwardParams)        output and logsumexp; a warp for each query
//   fiak_csr_entries_grad_query_T_dD_eE(CsrBackwardParams)    grad_query; a warp for each query
//   fiak_csr_entries_grad_key_T_dD_eE(CsrBackwardParams)      grad_key; a warp for each key of a key head
//   fiak_csr_entries_grad_value_T_dD_eE(CsrBackwardParams)    grad_value; a warp for each key of a key head
//     T: f32, f16, bf16; D: 64, 128, 256, at least head_dim and value_dim; E: samples of a pattern group that a warp
//     serves at once, 1 or 2; 1 with query_offsets
//     grid: ceil(queries / kEntriesWarps) * query_heads * ceil(batch / E) blocks, or of keys and key_heads
//   fiak_csr_entries_grad_prior_T_dD_eE(CsrBackwardParams)   grad_prior; a warp for each row of the pattern
//     with any query_offsets; grid: ceil(weights.num_rows / kEntriesWarps)
//   fiak_csr_delta_T(CsrBackwardParams)                       delta, which the others of backward read
//     grid: ceil(batch * query_heads * queries / kDeltaWarps); block: 32 * kDeltaWarps
//   block: 32 * kEntriesWarps but for delta; shared memory: 0; the first factor of each product runs fastest; both
//   structs are described in attention_params.h
//
// Heads that CsrPattern::uses_tiles gives to the kernels over tiles are left out, but for grad_prior.
#pragma once

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/csr_pattern.cuh"
#include "kernels/cuda/kernel.h"

namespace fiak::cuda {

constexpr int kEntriesWarps = 4;
constexpr int kRound = 32;        // entries at a time, one a lane
constexpr int kLaneColumns = 16;  // of a row, each lane of a team

/// How the lanes of a warp share a round: entry `step * kTeams + team()` is known to lane `step` of its team.
template <int kHead>
struct Lanes {
  static constexpr int kLanes = kHead / kLaneColumns;  // of a team
  static constexpr int kTeams = 32 / kLanes;

  __device__ static int team() { return lane_index() / kLanes; }
  __device__ static int part() { return lane_index() % kLanes; }
  /// The lane's own entry of a round.
  __device__ static int entry() { return part() * kTeams + team(); }
  /// How many steps it takes for this many entries.
  __device__ static int steps(int64_t entries) {
    return entries < kRound ? (static_cast<int>(entries) + kTeams - 1) / kTeams : kLanes;
  }
  /// What the team knows of its entry of a step.
  template <class T>
  __device__ static T of_step(T own, int step) {
    return __shfl_sync(kAllLanes, own, team() * kLanes + step);
  }

  __device__ static float team_sum(float x) {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
    return x;
  }

  /// The column of the lane's i-th number of a row.
  template <class Element>
  __device__ static int column(int i) {
    constexpr int kPiece = 16 / sizeof(Element);
    return (i / kPiece * kLanes + part()) * kPiece + i % kPiece;
  }

  /// Adds up what the lanes have that differ in the bits of kFrom, kFrom / 2, ... kLanes of their index; each of them
  /// keeps the sums of some columns, in front.
  template <int kFrom>
  __device__ __forceinline__ static void add_teams(float (&sums)[kLaneColumns]) {
    if constexpr (kFrom >= kLanes) {
      const bool is_upper = (lane_index() & kFrom) != 0;
#pragma unroll
      for (int i = 0; i < kFrom / 2; ++i) {
        const float lower = sums[i], upper = sums[i + kFrom / 2];
        sums[i] = (is_upper ? upper : lower) + __shfl_xor_sync(kAllLanes, is_upper ? lower : upper, kFrom);
      }
      add_teams<kFrom / 2>(sums);
    }
  }

  /// Writes the sums over all teams, times `factor`, to a row. A factor of 0 gives 0 whatever the sums are.
  template <class Element>
  __device__ static void store(float (&sums)[kLaneColumns], float factor, Element* row, int columns) {
    add_teams<16>(sums);
#pragma unroll
    for (int i = 0; i < kLanes / 2; i += 2) {
      const float x = factor == 0 ? 0 : factor * sums[i], y = factor == 0 ? 0 : factor * sums[i + 1];
      store_pair(row, column<Element>(team() * (kLanes / 2) + i), columns, x, y);
    }
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
__device__ __forceinline__ float warp_maximum(float x) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

/// A lane's columns of a row, as they lie in memory.
template <class Element>
struct Part {
  static constexpr int kPerWord = 4 / sizeof(Element);
  static constexpr int kWords = kLaneColumns / kPerWord;
  uint32_t words[kWords];

  /// The i-th number.
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kPerWord == 1) {
      return as_float(words[i]);
    } else {
      return widen(Element{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
    }
  }
};

/// q.k, or q.k - |k|^2 / 2, of a lane's columns.
template <class Query, class Key>
__device__ __forceinline__ float part_of_score(const Query& query, const Key& key, bool is_gaussian) {
  float sum = 0;
  if (is_gaussian) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) sum = fmaf(fmaf(-0.5f, key[i], query[i]), key[i], sum);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) sum = fmaf(query[i], key[i], sum);
  }
  return sum;
}
template <class X, class Y>
__device__ __forceinline__ float part_of_product(const X& x, const Y& y) {
  return part_of_score(x, y, false);
}

/// The rows of one head of an operand, of kSamples samples.
template <class Element, int kHead, int kSamples>
struct HeadRows {
  const Element* first;  ///< row 0 of the first sample
  int64_t sample_stride, row_stride;
  int columns;
  bool is_whole;  ///< whether rows consist of aligned pieces of 16 bytes

  __device__ HeadRows(const Input& x, int64_t b, int64_t h, int64_t groups, int columns)
      : first(head_of<Element>(x, b, h)),
        sample_stride(groups * x.batch_stride),
        row_stride(x.row_stride),
        columns(columns) {
    constexpr int64_t kPiece = 16 / sizeof(Element);
    is_whole = reinterpret_cast<uintptr_t>(first) % 16 == 0 &&
               (sample_stride % kPiece | row_stride % kPiece | columns % kPiece) == 0;
  }

  /// The lane's columns of a row of every sample: zeros where there are none, and where the row is not below
  /// `end[e]`.
  __device__ __forceinline__ void load(Part<Element> (&parts)[kSamples], int row, const int (&end)[kSamples]) const {
    constexpr int kPiece = 16 / sizeof(Element), kPerWord = Part<Element>::kPerWord;
    const Element* source = first + row * row_stride;
#pragma unroll
    for (int e = 0; e < kSamples; ++e, source += sample_stride) {
      const bool is_read = static_cast<unsigned>(row) < static_cast<unsigned>(end[e]);
#pragma unroll
      for (int i = 0; i < kLaneColumns; i += kPiece) {
        const int column = Lanes<kHead>::template column<Element>(i);
        uint32_t* words = &parts[e].words[i / kPerWord];
        if (is_whole) {
          load_16_bytes(words, source + column, is_read && column < columns);
        } else {
          load_elements(words, source + column, is_read ? columns - column : 0);
        }
      }
    }
  }
};

/// A lane's columns of a row as numbers: what is used again and again.
struct Numbers {
  float x[kLaneColumns];

  Numbers() = default;
  template <class Element>
  __device__ explicit Numbers(const Part<Element>& part) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) x[i] = part[i];
  }
  __device__ __forceinline__ float operator[](int i) const { return x[i]; }
};

/// Those of row `row` of an operand's head; zeros where that is -1.
template <class Element, int kHead>
__device__ __forceinline__ Numbers numbers_of(const Input& x, int64_t b, int64_t h, int row, int columns) {
  Part<Element> part[1];
  const int end[1] = {row + 1};
  HeadRows<Element, kHead, 1>(x, b, h, 0, columns).load(part, row, end);
  return Numbers(part[0]);
}

/// sums += weight * row of a lane's columns.
template <class Element>
__device__ __forceinline__ void add_part(float (&sums)[kLaneColumns], float weight, const Part<Element>& part) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sums[i] = fmaf(weight, part[i], sums[i]);
}

/// Dropout's factor of a pair, whose query is row `row` of its head; 1 without dropout.
__device__ __forceinline__ float dropout_of(const AttentionParams& params, int64_t b, int h, int64_t row, int key) {
  if (params.dropout_threshold == 0) return 1;
  const PhiloxWords words = philox_words(static_cast<uint64_t>(*params.seed), b, h, row, key / 4);
  const uint32_t even = (key & 2) == 0 ? words.word[0] : words.word[2];
  const uint32_t odd = (key & 2) == 0 ? words.word[1] : words.word[3];
  return dropout_factor(params, (key & 1) == 0 ? even : odd);
}

/// That of an entry.
template <class Params>
__device__ __forceinline__ float log_weight_of(const Params& params, int64_t entry) {
  const float* prior = params.weights.prior;
  return prior == nullptr ? 0 : log_weight(params, prior[entry]);
}

/// A pair's w exp(s - logsumexp); 0 in empty rows.
__device__ __forceinline__ float probability_of(float score, float log_weight, float logsumexp,
                                                const AttentionParams& params) {
  return exp2_approx(log_probability(params.scale * kLog2E * score, log_weight, logsumexp, params));
}

/// Up to kSamples batch elements of one pattern group, a bundle, b = first + e * groups.
template <int kSamples>
struct Samples {
  int first, groups, count;

  __device__ Samples(const AttentionParams& params, int groups, int first)
      : first(first), groups(groups), count(min(kSamples, (params.batch - first + groups - 1) / groups)) {}
  __device__ int at(int e) const { return first + e * groups; }
};

/// use(samples, a head, the warp's row of it), where `heads` heads of `rows` rows have a warp for each row and bundle
/// of up to kSamples samples.
template <int kSamples, class Use>
__device__ __forceinline__ void for_samples(const AttentionParams& params, int groups, int heads, int rows, Use&& use) {
  const auto blocks = static_cast<unsigned>(tiles_of(rows, kEntriesWarps));
  const int row = static_cast<int>(blockIdx.x % blocks) * kEntriesWarps + warp_index();
  const int head = static_cast<int>(blockIdx.x / blocks % static_cast<unsigned>(heads));
  if (row >= rows) return;
  // The host does not know how many groups there are, so that their bundles may outnumber the grid's.
  const int bundles = groups * ((params.batch / groups + kSamples - 1) / kSamples);
  const auto stride = static_cast<int>(gridDim.x / blocks / static_cast<unsigned>(heads));
  for (auto bundle = static_cast<int>(blockIdx.x / blocks / static_cast<unsigned>(heads)); bundle < bundles;
       bundle += stride) {
    use(Samples<kSamples>(params, groups, bundle % groups + bundle / groups * kSamples * groups), head, row);
  }
}

/// visit(entry, key, steps) for each round of a row: the lane's own entry, and its key or -1 where it has none.
template <int kHead, class Visit>
__device__ __forceinline__ void for_rounds(const PlanView& plan, int64_t row, Visit&& visit) {
  using L = Lanes<kHead>;
  const PlanRange entries = plan.row(row);
  for (int64_t first = entries.begin; first < entries.end; first += kRound) {
    const int64_t entry = first + L::entry();
    const int key = entry < entries.end ? static_cast<int>(plan.column(entry)) : -1;
    visit(entry, key, L::steps(entries.end - first));
  }
}

template <class Element, int kHead, int kSamples>
__device__ __forceinline__ void csr_entries_forward(const CsrForwardParams& params) {
  using L = Lanes<kHead>;
  using Rows = HeadRows<Element, kHead, kSamples>;
  const CsrPattern pattern(params, params.weights);
  const auto compute = [&](const Samples<kSamples>& samples, int h, int query) {
    const int key_head = h / (params.query_heads / params.key_heads);
    if (pattern.uses_tiles(params, params.weights, samples.first, key_head, sizeof(Element) == 2)) return;
    const int64_t row = query + pattern.offset(params, params.weights, samples.first);
    const Rows keys(params.key, samples.first, key_head, pattern.groups, params.head_dim);
    const Rows values(params.value, samples.first, key_head, pattern.groups, params.value_dim);
    Numbers queries[kSamples];
    Part<Element> parts[kSamples];
    float output[kSamples][kLaneColumns] = {}, maximum[kSamples], sum[kSamples] = {};
    int end[kSamples];
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      const bool is_there = e < samples.count;
      queries[e] = numbers_of<Element, kHead>(params.query, samples.at(e), h, is_there ? query : -1, params.head_dim);
      end[e] = is_there ? keys_of(params, samples.at(e)) : 0;
      maximum[e] = -kInfinity;
    }
    for_rounds<kHead>(pattern.plan, pattern.first_row(params, samples.first, h) + row,
                      [&](int64_t entry, int key, int steps) {
                        const float weight = key < 0 ? -kInfinity : log_weight_of(params, entry);
                        if (weight == -kInfinity) key = -1;
                        float scores[kSamples] = {};
#pragma unroll 1
                        for (int step = 0; step < steps; ++step) {
                          keys.load(parts, L::of_step(key, step), end);
#pragma unroll
                          for (int e = 0; e < kSamples; ++e) {
                            const float score = L::team_sum(part_of_score(queries[e], parts[e], params.is_gaussian));
                            if (step == L::part()) scores[e] = score;
                          }
                        }
#pragma unroll
                        for (int e = 0; e < kSamples; ++e) {
                          const bool is_there = static_cast<unsigned>(key) < static_cast<unsigned>(end[e]);
                          const float score = is_there ? params.scale * kLog2E * scores[e] + weight : -kInfinity;
                          const float before = maximum[e];
                          maximum[e] = fmaxf(before, warp_maximum(score));
                          const float base = maximum[e] == -kInfinity ? 0.0f : maximum[e];
                          const float correction = exp2_approx(before - base);
                          scores[e] = exp2_approx(score - base);
                          sum[e] = fmaf(sum[e], correction, scores[e]);
                          if (is_there) scores[e] *= dropout_of(params, samples.at(e), h, row, key);
#pragma unroll
                          for (int i = 0; i < kLaneColumns; ++i) output[e][i] *= correction;
                        }
#pragma unroll 1
                        for (int step = 0; step < steps; ++step) {
                          values.load(parts, L::of_step(key, step), end);
#pragma unroll
                          for (int e = 0; e < kSamples; ++e) add_part(output[e], L::of_step(scores[e], step), parts[e]);
                        }
                      });
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      if (e >= samples.count) break;
      const int64_t b = samples.at(e);
      const float total = warp_sum(sum[e]);  // at least 1, its largest term, or 0 for an empty row, or NaN
      L::store(output[e], total == 0 ? 0.0f : 1 / total,
               head_of<Element>(params.output, b, h) + query * params.output.row_stride, params.value_dim);
      if (lane_index() == 0) {
        params.logsumexp[(b * params.query_heads + h) * params.queries + query] =
            total == 0 ? -kInfinity : maximum[e] * kLn2 + logf(total);
      }
    }
  };
  for_samples<kSamples>(params, pattern.groups, params.query_heads, params.queries, compute);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

/// What the forward pass left of a query, if there is one.
__device__ __forceinline__ RowState row_state(const CsrBackwardParams& params, int64_t b, int h, int64_t query,
                                              bool is_there) {
  RowState state;
  if (is_there) {
    const int64_t at = (b * params.query_heads + h) * params.queries + query;
    state.logsumexp = params.logsumexp[at] * kLog2E;
    state.delta = params.delta[at];
  }
  return state;
}

/// The pairs of one row, for kSamples samples.
template <class Element, int kHead, int kSamples>
struct RowPairs {
  using L = Lanes<kHead>;

  const CsrBackwardParams& params;
  const Samples<kSamples>& samples;
  int h, key_head, row;  ///< the row: among its head's
  HeadRows<Element, kHead, kSamples> keys, values;
  Numbers queries[kSamples], grad_outputs[kSamples];
  RowState states[kSamples];
  int end[kSamples];  ///< of the keys

  /// query_of(e) is the row's query in the e-th sample, or -1.
  template <class QueryOf>
  __device__ RowPairs(const CsrBackwardParams& params, const Samples<kSamples>& samples, int h, int row,
                      QueryOf&& query_of)
      : params(params),
        samples(samples),
        h(h),
        key_head(h / (params.query_heads / params.key_heads)),
        row(row),
        keys(params.key, samples.first, key_head, samples.groups, params.head_dim),
        values(params.value, samples.first, key_head, samples.groups, params.value_dim) {
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      const int query = e < samples.count ? query_of(e) : -1, b = samples.at(e);
      queries[e] = numbers_of<Element, kHead>(params.query, b, h, query, params.head_dim);
      grad_outputs[e] = numbers_of<Element, kHead>(params.grad_output, b, h, query, params.value_dim);
      states[e] = row_state(params, b, h, query, query >= 0);
      end[e] = query >= 0 ? keys_of(params, b) : 0;
    }
  }

  /// d s of the lane's own entry in every sample or, of the weights, d w where log_weight is 0 or d ln w.
  template <bool kOfWeights = false>
  __device__ __forceinline__ void gradients(float (&grads)[kSamples], int key, float log_weight, int steps) const {
    float scores[kSamples] = {}, products[kSamples] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Part<Element> key_parts[kSamples], value_parts[kSamples];
      const int other = L::of_step(key, step);
      keys.load(key_parts, other, end);
      values.load(value_parts, other, end);
#pragma unroll
      for (int e = 0; e < kSamples; ++e) {
        const float score = L::team_sum(part_of_score(queries[e], key_parts[e], params.is_gaussian));
        const float product = L::team_sum(part_of_product(grad_outputs[e], value_parts[e]));
        if (step == L::part()) {
          scores[e] = score;
          products[e] = product;
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      grads[e] = 0;
      if (static_cast<unsigned>(key) < static_cast<unsigned>(end[e])) {
        const float factor = dropout_of(params, samples.at(e), h, row, key);
        const float log = log_probability(params.scale * kLog2E * scores[e], log_weight, states[e].logsumexp, params);
        grads[e] = kOfWeights ? weight_gradient(log, factor * products[e], states[e].delta)
                              : score_gradient(exp2_approx(log), factor * products[e], states[e].delta);
      }
    }
  }
};

template <class Element, int kHead, int kSamples>
__device__ __forceinline__ void csr_entries_grad_query(const CsrBackwardParams& params) {
  using L = Lanes<kHead>;
  const CsrPattern pattern(params, params.weights);
  const auto compute = [&](const Samples<kSamples>& samples, int h, int query) {
    const int key_head = h / (params.query_heads / params.key_heads);
    if (pattern.uses_tiles(params, params.weights, samples.first, key_head, sizeof(Element) == 2)) return;
    const int64_t row = query + pattern.offset(params, params.weights, samples.first);
    const RowPairs<Element, kHead, kSamples> pairs(params, samples, h, static_cast<int>(row),
                                                   [&](int) { return query; });
    float sums[kSamples][kLaneColumns] = {};
    const int64_t pattern_row = pattern.first_row(params, samples.first, h) + row;
    for_rounds<kHead>(pattern.plan, pattern_row, [&](int64_t entry, int key, int steps) {
      const float weight = key < 0 ? -kInfinity : log_weight_of(params, entry);
      if (weight == -kInfinity) key = -1;
      float grads[kSamples];
      pairs.gradients(grads, key, weight, steps);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        Part<Element> parts[kSamples];
        pairs.keys.load(parts, L::of_step(key, step), pairs.end);
#pragma unroll
        for (int e = 0; e < kSamples; ++e) add_part(sums[e], L::of_step(grads[e], step), parts[e]);
      }
    });
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      if (e >= samples.count) continue;
      Element* target = head_of<Element>(params.grad_query, samples.at(e), h) + query * params.grad_query.row_stride;
      L::store(sums[e], params.scale, target, params.head_dim);
    }
  };
  for_samples<kSamples>(params, pattern.groups, params.query_heads, params.queries, compute);
}

/// grad_key or grad_value: the queries of a key in the heads that share it, by the plan's transpose.
template <class Element, int kHead, int kSamples, bool kGradKey>
__device__ __forceinline__ void csr_entries_grad_column(const CsrBackwardParams& params) {
  using L = Lanes<kHead>;
  using Rows = HeadRows<Element, kHead, kSamples>;
  const CsrPattern pattern(params, params.weights);
  const PlanView& plan = pattern.plan;
  const auto compute = [&](const Samples<kSamples>& samples, int key_head, int key) {
    if (pattern.uses_tiles(params, params.weights, samples.first, key_head, sizeof(Element) == 2)) return;
    const int offset = static_cast<int>(pattern.offset(params, params.weights, samples.first));
    Numbers keys[kSamples], values[kSamples];
    float sums[kSamples][kLaneColumns] = {}, total[kSamples] = {};
    int end[kSamples];  // of the queries that may see the key
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      const int b = samples.at(e);
      const bool is_seen = e < samples.count && key < keys_of(params, b);
      end[e] = is_seen ? params.queries : 0;
      keys[e] = numbers_of<Element, kHead>(params.key, b, key_head, is_seen ? key : -1, params.head_dim);
      if (kGradKey) {
        values[e] = numbers_of<Element, kHead>(params.value, b, key_head, is_seen ? key : -1, params.value_dim);
      }
    }
    const int heads = params.query_heads / params.key_heads;
    for (int h = key_head * heads; h < (key_head + 1) * heads; ++h) {
      const Rows queries(params.query, samples.first, h, pattern.groups, params.head_dim);
      const Rows grad_outputs(params.grad_output, samples.first, h, pattern.groups, params.value_dim);
      const int64_t first_row = pattern.first_row(params, samples.first, h);
      const int64_t first_entry = plan.row_offsets[first_row], pattern_head = pattern.head_of(samples.first, h);
      const PlanRange places = plan.places(pattern_head, key);
      const int count = static_cast<int>(places.end - places.begin);
#pragma unroll 1
      for (int first = 0; first < count; first += kRound) {
        const int place = first + L::entry();
        float weight = -kInfinity;
        int query = -1;
        if (place < count) {
          const int64_t entry = first_entry + plan.positions[places.begin + place];
          weight = log_weight_of(params, entry);
          const int at = static_cast<int>(plan.query_of(pattern_head, plan.rows[places.begin + place], entry)) - offset;
          if (at >= 0 && at < params.queries && weight != -kInfinity) query = at;
        }
        const int steps = L::steps(count - first);
        float scores[kSamples] = {}, products[kSamples] = {};
        Part<Element> parts[kSamples], grad_parts[kSamples];
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const int other = L::of_step(query, step);
          queries.load(parts, other, end);
          if (kGradKey) grad_outputs.load(grad_parts, other, end);
#pragma unroll
          for (int e = 0; e < kSamples; ++e) {
            const float score = L::team_sum(part_of_score(parts[e], keys[e], params.is_gaussian));
            const float product = kGradKey ? L::team_sum(part_of_product(values[e], grad_parts[e])) : 0.0f;
            if (step == L::part()) {
              scores[e] = score;
              products[e] = product;
            }
          }
        }
#pragma unroll
        for (int e = 0; e < kSamples; ++e) {
          if (static_cast<unsigned>(query) >= static_cast<unsigned>(end[e])) {
            scores[e] = 0;
            continue;
          }
          const RowState state = row_state(params, samples.at(e), h, query, true);
          const float factor = dropout_of(params, samples.at(e), h, query + offset, key);
          const float p = probability_of(scores[e], weight, state.logsumexp, params);
          scores[e] = kGradKey ? score_gradient(p, factor * products[e], state.delta) : factor * p;
          total[e] += scores[e];
        }
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          (kGradKey ? queries : grad_outputs).load(parts, L::of_step(query, step), end);
#pragma unroll
          for (int e = 0; e < kSamples; ++e) add_part(sums[e], L::of_step(scores[e], step), parts[e]);
        }
      }
    }
    const Output& target = kGradKey ? params.grad_key : params.grad_value;
#pragma unroll
    for (int e = 0; e < kSamples; ++e) {
      if (e >= samples.count) continue;
      if (kGradKey && params.is_gaussian) {  // d s_ij / d k_j = scale (q_i - k_j)
        const float all = warp_sum(total[e]);
        if (all != 0 && L::team() == 0) {  // teams are added up; where nothing sees the key, it may be anything
#pragma unroll
          for (int i = 0; i < kLaneColumns; ++i) sums[e][i] -= all * keys[e][i];
        }
      }
      L::store(sums[e], kGradKey ? params.scale : 1.0f,
               head_of<Element>(target, samples.at(e), key_head) + key * target.row_stride,
               kGradKey ? params.head_dim : params.value_dim);
    }
  };
  for_samples<kSamples>(params, pattern.groups, params.key_heads, params.keys, compute);
}

template <class Element, int kHead, int kSamples>
__device__ __forceinline__ void csr_entries_grad_key(const CsrBackwardParams& params) {
  csr_entries_grad_column<Element, kHead, kSamples, true>(params);
}

template <class Element, int kHead, int kSamples>
__device__ __forceinline__ void csr_entries_grad_value(const CsrBackwardParams& params) {
  csr_entries_grad_column<Element, kHead, kSamples, false>(params);
}

/// d w of every entry of a row, outside the support, too. Samples from the second bundle on are added to what the lane
/// itself wrote for those before.
template <class Element, int kHead, int kSamples>
__device__ __forceinline__ void csr_entries_grad_prior(const CsrBackwardParams& params) {
  const CsrPattern pattern(params, params.weights);
  const int64_t pattern_row = int64_t{blockIdx.x} * kEntriesWarps + warp_index();
  if (pattern_row >= params.weights.num_rows) return;
  const int64_t pattern_head = pattern_row / pattern.plan.num_queries;
  const int64_t row = pattern_row - pattern_head * pattern.plan.num_queries;
  const int group = static_cast<int>(pattern_head / pattern.heads);
  const int readers = params.query_heads / pattern.heads;  // query heads of a pattern's head
  const int first_head = static_cast<int>(pattern_head % pattern.heads) * readers;
  for (int first = group; first < params.batch; first += kSamples * pattern.groups) {
    const Samples<kSamples> samples(params, pattern.groups, first);
    const auto query_of = [&](int e) {
      const int64_t query = row - pattern.offset(params, params.weights, samples.at(e));
      return query >= 0 && query < params.queries ? static_cast<int>(query) : -1;
    };
    for (int h = first_head; h < first_head + readers; ++h) {
      const RowPairs<Element, kHead, kSamples> pairs(params, samples, h, static_cast<int>(row), query_of);
      const bool is_first = first == group && h == first_head;
      for_rounds<kHead>(pattern.plan, pattern_row, [&](int64_t entry, int key, int steps) {
        float grads[kSamples], sum = 0;
        const float weight = params.log_prior && key >= 0 ? log_weight_of(params, entry) : 0;
        pairs.template gradients<true>(grads, key, weight, steps);
#pragma unroll
        for (int e = 0; e < kSamples; ++e) sum += grads[e];
        if (key >= 0) params.grad_prior[entry] = is_first ? sum : params.grad_prior[entry] + sum;
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

/// How many samples share a decoded row or column where there are as many. Twice as many would take twice the
/// registers, for the few percent of instructions that are left to share.
constexpr int kBundledSamples = 2;

#define FIAK_CSR_ENTRIES_KERNEL(what, Params, dtype, Element, kHead, kSamples)                        \
  FIAK_KERNEL(fiak_csr_entries_##what##_##dtype##_d##kHead##_e##kSamples,                             \
              csr_entries_##what##_kernel(Element, Constant<kHead>, Constant<kSamples>), Csr##Params, \
              32 * kEntriesWarps, 0, csr_entries_##what<Element, kHead, kSamples>)
#define FIAK_CSR_ENTRIES_KERNELS_OF(dtype, Element, kHead, kSamples)                   \
  FIAK_CSR_ENTRIES_KERNEL(forward, ForwardParams, dtype, Element, kHead, kSamples)     \
  FIAK_CSR_ENTRIES_KERNEL(grad_query, BackwardParams, dtype, Element, kHead, kSamples) \
  FIAK_CSR_ENTRIES_KERNEL(grad_key, BackwardParams, dtype, Element, kHead, kSamples)   \
  FIAK_CSR_ENTRIES_KERNEL(grad_value, BackwardParams, dtype, Element, kHead, kSamples) \
  FIAK_CSR_ENTRIES_KERNEL(grad_prior, BackwardParams, dtype, Element, kHead, kSamples)
#define FIAK_CSR_ENTRIES_KERNELS(dtype, Element, kHead) \
  FIAK_CSR_ENTRIES_KERNELS_OF(dtype, Element, kHead, 1) \
  FIAK_CSR_ENTRIES_KERNELS_OF(dtype, Element, kHead, 2)
static_assert(kBundledSamples == 2, "of which there are kernels");
FIAK_FOR_ATTENTION_TYPES(FIAK_CSR_ENTRIES_KERNELS)
#undef FIAK_CSR_ENTRIES_KERNELS
#undef FIAK_CSR_ENTRIES_KERNELS_OF
#undef FIAK_CSR_ENTRIES_KERNEL

#define FIAK_CSR_DELTA_KERNEL(dtype, Element)                                                            \
  FIAK_KERNEL(fiak_csr_delta_##dtype, csr_delta_kernel(Element), CsrBackwardParams, 32 * kDeltaWarps, 0, \
              compute_delta<Element>)
FIAK_FOR_ATTENTION_DTYPES(FIAK_CSR_DELTA_KERNEL)
#undef FIAK_CSR_DELTA_KERNEL

/// visit(Kernel) for all of them.
template <class Visit>
void for_each_csr_entries_kernel(Visit&& visit) {
  for_each_attention_dtype([&](auto element) { visit(csr_delta_kernel(element)); });
  for_each_attention_type([&](auto element, auto head) {
    const auto visit_all = [&](auto samples) {
      visit(csr_entries_forward_kernel(element, head, samples));
      visit(csr_entries_grad_query_kernel(element, head, samples));
      visit(csr_entries_grad_key_kernel(element, head, samples));
      visit(csr_entries_grad_value_kernel(element, head, samples));
      visit(csr_entries_grad_prior_kernel(element, head, samples));
    };
    visit_all(Constant<1>{});
    visit_all(Constant<kBundledSamples>{});
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host

/// call(Constant<kHead>{}, Constant<kSamples>{}) for the kernels of these arguments: several samples at once where a
/// row is the same query in all of them.
template <class Call>
void with_entries_kernel_of(const AttentionArgs& args, const CsrWeights& weights, Call&& call) {
  with_head_of(args, [&](auto head) {
    if (args.batch > 1 && weights.query_offsets == nullptr) {
      call(head, Constant<kBundledSamples>{});
    } else {
      call(head, Constant<1>{});
    }
  });
}

/// Does launch(kernel, blocks, params) of what computes `result` by entries; there must be pairs. The first argument,
/// of any value, is of the arguments' dtype.
template <class Element, class Launch>
void csr_entries_forward(Element element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                         const ForwardResult& result, Launch&& launch) {
  with_entries_kernel_of(args, weights, [&](auto head, auto samples) {
    const int64_t bundles = tiles_of(args.batch, decltype(samples)::value);
    launch(csr_entries_forward_kernel(element, head, samples),
           tiles_of(args.queries, kEntriesWarps) * args.query_heads * bundles,
           forward_params(args, weights, seed, result));
  });
}

/// The same of the gradients that are wanted, after delta, which is scratch, [batch, query_heads, queries]. Where no
/// head is computed by entries (`has_heads`), these are delta and the prior's gradient alone.
template <class Element, class Launch>
void csr_entries_backward(Element element, const AttentionArgs& args, const CsrWeights& weights, const int64_t* seed,
                          const BackwardArgs& grads, float* delta, bool has_heads, Launch&& launch) {
  with_entries_kernel_of(args, weights, [&](auto head, auto samples) {
    const CsrBackwardParams params = backward_params(args, weights, seed, grads, delta);
    const int64_t bundles = tiles_of(args.batch, decltype(samples)::value);
    const int64_t query_blocks = tiles_of(args.queries, kEntriesWarps) * args.query_heads * bundles;
    const int64_t key_blocks = tiles_of(args.keys, kEntriesWarps) * args.key_heads * bundles;
    launch(csr_delta_kernel(element), tiles_of(args.batch * args.query_heads * args.queries, kDeltaWarps), params);
    if (has_heads && grads.grad_query.data != nullptr) {
      launch(csr_entries_grad_query_kernel(element, head, samples), query_blocks, params);
    }
    if (has_heads && grads.grad_key.data != nullptr) {
      launch(csr_entries_grad_key_kernel(element, head, samples), key_blocks, params);
    }
    if (has_heads && grads.grad_value.data != nullptr) {
      launch(csr_entries_grad_value_kernel(element, head, samples), key_blocks, params);
    }
    if (grads.grad_prior != nullptr) {
      launch(csr_entries_grad_prior_kernel(element, head, samples), tiles_of(weights.num_rows, kEntriesWarps), params);
    }
  });
}

}  // namespace fiak::cuda
