// Runs every kernel of csrc over odd sizes, in heap blocks without a byte to spare: what a sanitizer needs to see one
// element read or written beside its array. Values are tested elsewhere, in Python; here only that every element of a
// result was written and is finite. RELLAX_ISA chooses the level.
//
//     driver kernels      every kernel, alone and on three threads
//     driver callers      several threads call kernels at once, each on a team of its own
//     driver overflow     makes a mistake that a sanitizer must stop, to show that it does; so do underflow, undefined
//                         and race
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "answer.h"
#include "cflora.h"
#include "dispatch.h"
#include "gate_bank.h"
#include "history_topk.h"
#include "item_topk.h"
#include "parallel.h"
#include "soft_prompt.h"

namespace {

using namespace rellax;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
const std::vector<Dtype> kTwoDtypes{Dtype::float32, Dtype::bfloat16};
const std::vector<Dtype> kDtypes{Dtype::float32, Dtype::bfloat16, Dtype::float16};

// Small numbers, the same in every run.
class Random {
public:
    uint32_t next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 33);
    }
    int64_t below(int64_t limit) { return next() % limit; }
    float value() { return static_cast<float>(below(4096)) / 2048.0f - 1.0f; }

private:
    uint64_t state_ = 7;
};

thread_local Random random_source;

uint16_t upper_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

// A heap block of exactly `count` elements after `shift` others, so that vectors are not aligned in it.
template <class T>
class Block {
public:
    Block(int64_t count, int64_t shift, T value) : count_(count), shift_(shift), memory_(new T[count + shift]) {
        std::fill_n(memory_.get(), count + shift, value);
    }
    T* get() const { return memory_.get() + shift_; }
    int64_t size() const { return count_; }

private:
    int64_t count_, shift_;
    std::unique_ptr<T[]> memory_;
};

// As a block of one of three dtypes.
class Array {
public:
    Array(Dtype dtype, int64_t count, int64_t shift) : dtype_(dtype), floats_(0, 0, 0.0f), halves_(0, 0, 0) {
        if (dtype == Dtype::float32) floats_ = Block<float>(count, shift, kNaN);
        if (dtype != Dtype::float32) halves_ = Block<uint16_t>(count, shift, 0x7fff);  // NaN in both
    }

    static Array of_values(Dtype dtype, int64_t count, int64_t shift) {
        Array array(dtype, count, shift);
        for (int64_t i = 0; i < count; ++i) {
            const float value = random_source.value();
            if (dtype == Dtype::float32) array.floats_.get()[i] = value;
            if (dtype == Dtype::bfloat16) array.halves_.get()[i] = upper_half(value);
            if (dtype == Dtype::float16) array.halves_.get()[i] = static_cast<uint16_t>(0x3000 + random_source.below(2048));
        }
        return array;
    }

    void* get() const { return dtype_ == Dtype::float32 ? static_cast<void*>(floats_.get()) : halves_.get(); }

    bool finite() const {
        const uint16_t exponent = dtype_ == Dtype::bfloat16 ? 0x7f80 : 0x7c00;
        return std::all_of(floats_.get(), floats_.get() + floats_.size(), [](float x) { return std::isfinite(x); }) &&
               std::all_of(halves_.get(), halves_.get() + halves_.size(),
                           [&](uint16_t bits) { return (bits & exponent) != exponent; });
    }

private:
    Dtype dtype_;
    Block<float> floats_;
    Block<uint16_t> halves_;
};

Block<float> floats(int64_t count, int64_t shift = 0) {
    Block<float> block(count, shift, 0.0f);
    for (int64_t i = 0; i < count; ++i) block.get()[i] = random_source.value();
    return block;
}

Block<float> unwritten(int64_t count, int64_t shift = 0) { return {count, shift, kNaN}; }

Block<int64_t> integers(int64_t count, int64_t first, int64_t limit) {
    Block<int64_t> block(count, 0, 0);
    for (int64_t i = 0; i < count; ++i) block.get()[i] = first + random_source.below(limit - first);
    return block;
}

// Rows of `d` elements `stride` apart: the last one ends the block.
int64_t extent(int64_t rows, int64_t d, int64_t stride) { return rows == 0 ? 0 : (rows - 1) * stride + d; }

void expect(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
}

void expect_finite(const Block<float>& block, const std::string& what) {
    expect(std::all_of(block.get(), block.get() + block.size(), [](float x) { return std::isfinite(x); }), what);
}

void expect_finite(const Array& array, const std::string& what) { expect(array.finite(), what); }

std::vector<int64_t> running_sum(const std::vector<int64_t>& lengths) {
    std::vector<int64_t> offsets{0};
    for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
    return offsets;
}

void run_answer(Dtype dtype, int64_t n, int64_t d, int64_t vocabulary, int64_t variant, int threads) {
    const int64_t shift = variant & 1, stride = d + (variant & 2);
    const float softcap = variant & 1 ? 2.0f : 0.0f;
    const Array rows = Array::of_values(dtype, n * d, shift);
    const Array weight = Array::of_values(dtype, extent(vocabulary, d, stride), shift);
    const Block<float> bias = floats(vocabulary, shift), lse = unwritten(n, shift), mean = unwritten(n * d, shift);
    answer_forward({dtype, n, d, vocabulary, rows.get(), weight.get(), stride, variant & 2 ? bias.get() : nullptr,
                    softcap, lse.get(), variant == 3 ? nullptr : mean.get()},
                   threads);
    expect_finite(lse, "answer: lse");
    if (variant != 3) expect_finite(mean, "answer: mean");
}

void answers(int threads) {
    for (const Dtype dtype : kTwoDtypes) {
        for (const int64_t n : {1, 5}) {
            for (const int64_t d : {1, 15, 16, 33, 129}) {
                for (const int64_t vocabulary : {1, 3, 65, 2049}) {
                    for (int64_t variant = 0; variant < 4; ++variant) {
                        run_answer(dtype, n, d, vocabulary, variant, threads);
                    }
                }
            }
        }
    }
}

struct CfloraSizes {
    int64_t r, d_in;
    std::vector<int64_t> d_outs, lengths;
};

// One layer's memory; `rows` is y in the forward pass and dy in the backward pass.
struct CfloraMemory {
    Array y, dy, base, a, b;
    Block<float> gate, dgate;
};

void run_cflora(Dtype dtype, const CfloraSizes& sizes, int64_t variant, int threads) {
    const int64_t shift = variant & 1, padding = variant & 2, r = sizes.r, d_in = sizes.d_in;
    const bool gated = variant != 1, drops = variant >= 2;
    const auto layers = static_cast<int64_t>(sizes.d_outs.size());
    const std::vector<int64_t> offsets = running_sum(sizes.lengths);
    const int64_t tokens = offsets.back(), instances = static_cast<int64_t>(sizes.lengths.size());
    const Array x = Array::of_values(dtype, extent(tokens, d_in, d_in + padding), shift);
    const Array dx = Array::of_values(dtype, tokens * d_in, shift);
    const Block<float> h = unwritten(tokens * layers * r), dh = unwritten(h.size()), z = unwritten(h.size());
    Block<uint32_t> hashes(padded_columns(d_in), 0, 0);
    for (int64_t i = 0; i < hashes.size(); ++i) hashes.get()[i] = random_source.next() * 2;
    const Dropout dropout = drops ? Dropout{hashes.get(), 17, -1000000000, 1.25f} : Dropout{nullptr, 0, 0, 1.0f};

    std::vector<CfloraMemory> memory;
    for (const int64_t d : sizes.d_outs) {
        memory.push_back({Array(dtype, tokens * d, shift), Array::of_values(dtype, extent(tokens, d, d + padding), shift),
                          Array::of_values(dtype, extent(tokens, d, d + padding), shift),
                          Array::of_values(dtype, r * d_in, shift), Array::of_values(dtype, r * d, shift),
                          floats(instances * r * r), unwritten(instances * r * r)});
    }
    const auto layers_of = [&](bool forward) {
        std::vector<CfloraLayer> all;
        for (int64_t i = 0; i < layers; ++i) {
            const int64_t d = sizes.d_outs[i];
            const CfloraMemory& own = memory[i];
            const CfloraFactor a = variant & 1 ? CfloraFactor{own.a.get(), 1, r} : CfloraFactor{own.a.get(), d_in, 1};
            const CfloraFactor b = variant & 1 ? CfloraFactor{own.b.get(), d, 1} : CfloraFactor{own.b.get(), 1, r};
            CfloraLayer layer{};
            layer.d = d;
            layer.rows = forward ? own.y.get() : own.dy.get();
            layer.stride = forward ? d : d + padding;
            layer.base = forward && variant != 3 ? own.base.get() : nullptr;
            layer.base_stride = d + padding;
            layer.a = a;
            layer.b = b;
            layer.gate = gated ? own.gate.get() : nullptr;
            all.push_back(layer);
        }
        return all;
    };
    Cflora task{};
    task.dtype = dtype;
    task.r = r;
    task.layers = layers;
    task.d_in = d_in;
    task.scale = 0.5f;
    task.dropout = dropout;
    task.h = h.get();

    const std::vector<CfloraLayer> forward = layers_of(true), backward = layers_of(false);
    task.layer = forward.data();
    task.x = x.get();
    task.x_stride = d_in + padding;
    cflora_forward(task, offsets.data(), instances, threads);
    expect_finite(h, "cflora: h");
    for (const CfloraMemory& own : memory) expect_finite(own.y, "cflora: y");

    task.layer = backward.data();
    task.x = variant == 3 ? nullptr : dx.get();
    task.x_stride = d_in;
    task.accumulate = variant & 1;
    task.dh = variant == 2 ? nullptr : dh.get();
    task.z = variant == 1 ? nullptr : z.get();
    std::vector<float*> dgates;
    for (const CfloraMemory& own : memory) dgates.push_back(own.dgate.get());
    cflora_backward(task, offsets.data(), instances, gated ? dgates.data() : nullptr, threads);
    if (task.x != nullptr) expect_finite(dx, "cflora: dx");
    if (task.dh != nullptr) expect_finite(dh, "cflora: dh");
    if (task.z != nullptr) expect_finite(z, "cflora: z");
    for (const CfloraMemory& own : memory) {
        if (gated) expect_finite(own.dgate, "cflora: dgate");
    }

    if (tokens == 0 || task.dh == nullptr) return;
    const int64_t components = layers * r;
    const Block<float> da = unwritten(padded_components(components) * padded_columns(d_in));
    cflora_outer({dtype, tokens, components, d_in, dh.get(), components, x.get(), d_in + padding, dropout, da.get()}, threads);
    for (int64_t c = 0; c < components; ++c) {
        const float* const row = da.get() + c * padded_columns(d_in);
        expect(std::all_of(row, row + d_in, [](float value) { return std::isfinite(value); }), "cflora: dA");
    }
}

void cfloras(int threads) {
    const std::vector<CfloraSizes> all{
        {1, 1, {1}, {1}},
        {3, 7, {5, 1}, {1, 0, 6}},
        {4, 33, {31, 130, 17}, {40, 33}},
        {8, 129, {65}, {0, 67, 1, 32}},
        {17, 64, {32, 9}, {33}},
        {2, 5, {3}, {}},
        {2, 5, {3}, {0, 0}},
    };
    for (const Dtype dtype : kTwoDtypes) {
        for (const CfloraSizes& sizes : all) {
            for (int64_t variant = 0; variant < 4; ++variant) run_cflora(dtype, sizes, variant, threads);
        }
    }
    run_cflora(Dtype::float32, {8, 257, {255, 129}, {90, 170}}, 2, threads);  // enough work for several threads
}

void run_gate_bank(Dtype dtype, int64_t projections, int64_t instances, int64_t d_u, int64_t r, int64_t variant,
                   int threads) {
    const int64_t shift = variant & 1, hidden = 2 * r * r, outputs = variant & 2 ? r : r * r;
    const Block<float> u = floats(instances * d_u, shift);
    const auto parameter = [&](int64_t count) { return Array::of_values(dtype, projections * count, shift); };
    const auto gradient = [&](int64_t count) { return Array(dtype, projections * count, shift); };
    const Array ln_weight = parameter(d_u), ln_bias = parameter(d_u), w1 = parameter(hidden * d_u), b1 = parameter(hidden),
                w2 = parameter(outputs * hidden), b2 = parameter(outputs);
    const GateBank bank{dtype,   projections,     instances,     d_u,      hidden,   outputs, u.get(), 1e-5f,
                        ln_weight.get(), ln_bias.get(), w1.get(), b1.get(), w2.get()};
    const Block<float> flat = unwritten(projections * instances * outputs, shift);
    gate_bank_forward(bank, b2.get(), flat.get(), threads);
    expect_finite(flat, "gate_bank: flat");

    const Block<float> dflat = floats(flat.size(), shift), du = unwritten(instances * d_u, shift);
    const Array dln_weight = gradient(d_u), dln_bias = gradient(d_u), dw1 = gradient(hidden * d_u), db1 = gradient(hidden),
                dw2 = gradient(outputs * hidden), db2 = gradient(outputs);
    gate_bank_backward(bank,
                       {dflat.get(), variant & 1 ? nullptr : du.get(), dln_weight.get(), dln_bias.get(), dw1.get(),
                        db1.get(), dw2.get(), db2.get()},
                       threads);
    if (!(variant & 1)) expect_finite(du, "gate_bank: du");
    for (const Array* found : {&dln_weight, &dln_bias, &dw1, &db1, &dw2, &db2}) expect_finite(*found, "gate_bank: gradient");
}

void gate_banks(int threads) {
    for (const Dtype dtype : kTwoDtypes) {
        for (const int64_t instances : {0, 1, 7, 129}) {
            for (const int64_t d_u : {1, 5, 16, 33}) {
                for (const int64_t r : {1, 2, 3}) {
                    for (int64_t variant = 0; variant < 4; ++variant) {
                        run_gate_bank(dtype, 2, instances, d_u, r, variant, threads);
                    }
                }
            }
        }
        run_gate_bank(dtype, 67, 3, 9, 2, 0, threads);
        run_gate_bank(dtype, 2, 33, 150, 9, 0, threads);
        run_gate_bank(dtype, 2, 3, 64, 8, 0, threads);  // whole vectors, few instances
    }
}

// `every`: each behaviour is a target; else `queries` random ones.
void run_history(Dtype dtype, int64_t count, int64_t dim, const std::vector<int64_t>& lengths, int64_t k, bool every,
                 int64_t queries, int threads) {
    const std::vector<int64_t> sums = running_sum(lengths);
    const auto users = static_cast<int64_t>(lengths.size());
    const int64_t behaviours = sums.back();
    Block<int64_t> offsets(users + 1, 0, 0);
    std::copy(sums.begin(), sums.end(), offsets.get());
    const Array embeddings = Array::of_values(dtype, count * dim, dim & 1);
    const Block<int64_t> items = integers(behaviours, 0, count);
    queries = every ? behaviours : queries;
    const Block<int64_t> target = integers(every ? 0 : queries, 0, count), user = integers(target.size(), 0, users);
    const Block<int64_t> end(target.size(), 0, 0);
    for (int64_t q = 0; q < end.size(); ++q) end.get()[q] = random_source.below(lengths[user.get()[q]] + 1);
    const Block<int64_t> positions(queries * k, 0, -7);
    const Block<float> scores = unwritten(queries * k);
    HistoryTopk task{};
    task.embeddings = embeddings.get();
    task.dtype = dtype;
    task.count = count;
    task.dim = dim;
    task.items = items.get();
    task.offsets = offsets.get();
    task.users = users;
    if (!every) {
        task.target = target.get();
        task.user = user.get();
        task.end = end.get();
    }
    task.queries = queries;
    task.k = k;
    task.positions = positions.get();
    task.scores = scores.get();
    history_topk(task, threads);
    for (int64_t i = 0; i < positions.size(); ++i) {
        expect(positions.get()[i] >= -1 && !std::isnan(scores.get()[i]), "history_topk: results");
    }
}

void histories(int threads) {
    for (const Dtype dtype : kDtypes) {
        for (const int64_t dim : {1, 7, 33, 64, 129}) {
            for (const int64_t k : {1, 3, 30}) {
                run_history(dtype, 50, dim, {7, 0, 12, 1}, k, true, 0, threads);      // from rows
                run_history(dtype, 9, dim, {7, 0, 12, 1, 66}, k, true, 0, threads);   // rows of all targets
                run_history(dtype, 21, dim, {9, 66, 0, 11}, k, false, 30, threads);   // rows of some
                run_history(dtype, 900, dim, {150, 0, 180}, k, false, 450, threads);  // products of packed rows
                run_history(dtype, 90, dim, std::vector<int64_t>(12, 170), k, false, 12, threads);  // sketches
                run_history(dtype, 900, dim, {150, 180, 131}, k, false, 6, threads);  // far rows, as they are
            }
        }
        run_history(dtype, 300, 5, {0, 1, 2100}, 30, true, 0, threads);  // more than one packed block
        run_history(dtype, 3000, 3, {1300, 700}, 40, true, 0, threads);
        for (const int64_t k : {200, 600, 1100}) {
            run_history(dtype, 5000, 2, {1500, 1300}, k, false, 40, threads);
            run_history(dtype, 5000, 2, {1500, 300}, k, false, 5, threads);
        }
        run_history(dtype, 30, 600, {220, 31}, 30, true, 0, threads);
        run_history(dtype, 3000, 1400, {1100, 1090, 1200}, 5, false, 300, threads);  // rows that take several blocks
    }
    run_history(Dtype::float32, 1, 1, {}, 1, true, 0, threads);
    run_history(Dtype::float32, 3, 4, {0, 0}, 2, false, 5, threads);
    try {
        HistoryTopk task{};
        task.queries = kMostHistoryQueries + 1;
        history_topk(task, threads);
    } catch (const std::length_error&) {
        return;
    }
    expect(false, "history_topk: more queries than an order has room for");
}

void run_items(Dtype dtype, int64_t items, int64_t dim, int64_t k, bool every, int64_t queries, int threads) {
    queries = every ? items : queries;
    const Array embeddings = Array::of_values(dtype, items * dim, dim & 1);
    const Block<int64_t> query = integers(every ? 0 : queries, 0, std::max<int64_t>(items, 1));
    const Block<int64_t> indices(queries * k, 0, -7);
    const Block<float> scores = unwritten(queries * k);
    ItemTopkSearch search({embeddings.get(), dtype, items, dim, every ? nullptr : query.get(), queries, k, (k & 1) == 1,
                           indices.get(), scores.get()},
                          threads);
    while (search.step()) {
    }
    for (int64_t i = 0; i < indices.size(); ++i) {
        expect(indices.get()[i] >= -1 && indices.get()[i] < items && !std::isnan(scores.get()[i]), "item_topk: results");
    }
}

void item_lists(int threads) {
    for (const Dtype dtype : kDtypes) {
        for (const int64_t dim : {1, 7, 33, 64, 129}) {
            for (const int64_t items : {1, 2, 31, 33, 100}) {
                for (const int64_t k : {1, 4, 37}) {
                    run_items(dtype, items, dim, k, true, 0, threads);
                    run_items(dtype, items, dim, k, false, 5, threads);
                }
            }
        }
        run_items(dtype, 1100, 2, 3, true, 0, threads);
        run_items(dtype, 8200, 1, 3, false, 2, threads);
    }
    run_items(Dtype::float32, 0, 3, 2, true, 0, threads);
    run_items(Dtype::float32, 20, 3, 2, false, 0, threads);
}

void run_soft_prompt(Dtype words_dtype, Dtype soft_dtype, int64_t tokens, int64_t d, int64_t variant, int threads) {
    constexpr int64_t kWords = 5, kSoft = 3;
    const int64_t shift = variant & 1, stride = d + (variant & 2);
    const Array words = Array::of_values(words_dtype, extent(kWords, d, stride), shift);
    const Array soft = Array::of_values(soft_dtype, extent(kSoft, d, stride), shift);
    const Block<int64_t> ids = integers(tokens, 0, kWords), index = integers(tokens, -2, kSoft);
    const Array out(words_dtype, tokens * d, shift);
    const SoftPrompt task{{words.get(), words_dtype, kWords, stride},
                          {soft.get(), soft_dtype, kSoft, stride},
                          variant & 1 ? 1.5f : 1.0f,
                          ids.get(),
                          index.get(),
                          tokens,
                          d,
                          out.get()};
    soft_prompt(task, threads);
    expect_finite(out, "soft_prompt: out");

    const Array rows = Array::of_values(words_dtype, extent(tokens, d, stride), shift);
    const Array sums(soft_dtype, kSoft * d, shift);
    const Block<int64_t> sum = integers(tokens, -2, kSoft + 2);
    row_sums({{rows.get(), words_dtype, tokens, stride}, sum.get(), 0.5f, d, kSoft, soft_dtype, sums.get()}, threads);
    expect_finite(sums, "row_sums: out");
    if (tokens == 0) return;
    ids.get()[tokens - 1] = variant & 1 ? kWords : -1;
    index.get()[tokens - 1] = variant & 2 ? kSoft : -1;
    try {
        soft_prompt(task, threads);
    } catch (const std::invalid_argument&) {
        return;
    }
    expect(false, "soft_prompt: a row that no table has");
}

void soft_prompts(int threads) {
    for (const Dtype words : kDtypes) {
        for (const Dtype soft : kDtypes) {
            for (const int64_t d : {1, 15, 17, 1025}) {
                for (const int64_t tokens : {0, 1, 7, 40}) {
                    for (int64_t variant = 0; variant < 4; ++variant) {
                        run_soft_prompt(words, soft, tokens, d, variant, threads);
                    }
                }
            }
        }
    }
    run_soft_prompt(Dtype::float32, Dtype::bfloat16, 900, 1025, 1, threads);
    run_soft_prompt(Dtype::bfloat16, Dtype::bfloat16, 8200, 2049, 0, threads);  // large enough for large pages
}

void kernels() {
    for (const int threads : {1, 3}) {
        answers(threads);
        cfloras(threads);
        gate_banks(threads);
        histories(threads);
        item_lists(threads);
        soft_prompts(threads);
    }
}

// Each caller has a team of its own, as OpenMP gives it.
void callers() {
    std::vector<std::thread> all;
    for (int caller = 0; caller < 3; ++caller) {
        all.emplace_back([caller] {
            for (int round = 0; round < 2; ++round) {
                run_answer(Dtype::bfloat16, 5, 33, 6000, caller, 3);
                run_cflora(Dtype::float32, {8, 257, {255, 129}, {90, 170}}, 2, 3);
                run_cflora(Dtype::bfloat16, {4, 33, {31, 130, 17}, {40, 33}}, 0, 3);
                run_gate_bank(Dtype::float32, 67, 40, 33, 8, 0, 3);
                run_history(Dtype::bfloat16, 300, 33, {200, 1, 330}, 7, true, 0, 3);
                run_history(Dtype::float32, 20, 40, {40, 90, 100, 66}, 5, false, 60, 3);
                run_items(Dtype::float32, 500, 17, 5, true, 0, 3);
                run_items(Dtype::bfloat16, 300, 17, 5, false, 90, 3);
                run_soft_prompt(Dtype::float32, Dtype::bfloat16, 900, 1025, 1, 3);
            }
        });
    }
    for (std::thread& caller : all) caller.join();
}

// Asks answer_forward for as many results as it was told, in a block with room for one less.
void overflow() {
    const Block<float> rows = floats(3 * 5), weight = floats(7 * 5), lse = unwritten(2);
    answer_forward({Dtype::float32, 3, 5, 7, rows.get(), weight.get(), 5, nullptr, 0.0f, lse.get(), nullptr}, 1);
}

// A kernel, compiled for its level, that reads one element before a table's first.
void underflow() {
    const Block<float> rows = floats(3 * 5), weight = floats(7 * 5), lse = unwritten(3);
    answer_forward({Dtype::float32, 3, 5, 7, rows.get(), weight.get() - 1, 5, nullptr, 0.0f, lse.get(), nullptr}, 1);
}

// Floats at an odd address.
void undefined() {
    const Block<float> u = floats(8);
    const float* const odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(u.get()) + 1);
    const Block<float> parameters = floats(64), flat = unwritten(1);
    gate_bank_forward({Dtype::float32, 1, 1, 4, 2, 1, odd, 1e-5f, parameters.get(), parameters.get(), parameters.get(),
                       parameters.get(), parameters.get()},
                      parameters.get(), flat.get(), 1);
}

// Three threads, which wait for one another in a way that orders nothing, add to the same number.
void race() {
    int64_t sum = 0;
    std::atomic<int> begun{0};
    parallel_for(3, 3, [&](int64_t index) {
        begun.fetch_add(1, std::memory_order_relaxed);
        while (begun.load(std::memory_order_relaxed) < 3) std::this_thread::yield();
        sum += index;
    });
    std::printf("%lld\n", static_cast<long long>(sum));
}

// In place of OpenMP's: its runtime was built without sanitizers.
void team(void (*function)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(function, data);
    function(data);
    for (std::thread& other : others) other.join();
}

}  // namespace

int main(int count, char** arguments) {
    set_parallel_region(team);
    const std::vector<std::pair<std::string, std::function<void()>>> all{
        {"kernels", kernels},     {"callers", callers},     {"overflow", overflow},
        {"underflow", underflow}, {"undefined", undefined}, {"race", race}};
    for (const auto& [name, run] : all) {
        if (count != 2 || name != arguments[1]) continue;
        run();
        std::printf("%s: %s done\n", level().name, name.c_str());
        return 0;
    }
    std::fprintf(stderr, "usage: driver kernels | callers | overflow | underflow | undefined | race\n");
    return 2;
}
