// The Python module rellax._C: the only file that knows of Python. Tensors come in as addresses and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "answer.h"
#include "cflora.h"
#include "dispatch.h"
#include "gate_bank.h"
#include "history_topk.h"
#include "item_topk.h"
#include "parallel.h"
#include "soft_prompt.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

rellax::Dtype dtype_named(const std::string& name) {
    if (name == "float32") return rellax::Dtype::float32;
    if (name == "bfloat16") return rellax::Dtype::bfloat16;
    if (name == "float16") return rellax::Dtype::float16;
    throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
}

void answer_forward(const char* dtype, int64_t n, int64_t d, int64_t vocabulary, Address rows, Address weight,
                    int64_t weight_stride, Address bias, float softcap, Address lse, Address mean, int threads) {
    const rellax::Answer task{dtype_named(dtype),   n,  d, vocabulary, at<const void>(rows), at<const void>(weight),
                              weight_stride, at<const float>(bias), softcap, at<float>(lse), at<float>(mean)};
    const nb::gil_scoped_release unlocked;
    rellax::answer_forward(task, threads);
}

using Addresses = std::vector<Address>;

using Factor = std::tuple<Address, int64_t, int64_t>;

rellax::CfloraFactor cflora_factor(const Factor& factor) {
    return {at<const void>(std::get<0>(factor)), std::get<1>(factor), std::get<2>(factor)};
}

// A set of layers that share x.
class CfloraTask {
public:
    CfloraTask(const char* dtype, int64_t r, int64_t d_in, Address x, int64_t x_stride, bool accumulate,
               std::vector<rellax::CfloraLayer> layers, float scale, const rellax::Dropout& dropout, Address h)
        : layers_(std::move(layers)) {
        task.dtype = dtype_named(dtype);
        task.r = r;
        task.layers = static_cast<int64_t>(layers_.size());
        task.layer = layers_.data();
        task.d_in = d_in;
        task.x = at<void>(x);
        task.x_stride = x_stride;
        task.accumulate = accumulate;
        task.scale = scale;
        task.dropout = dropout;
        task.h = at<float>(h);
    }

    rellax::Cflora task{};

private:
    std::vector<rellax::CfloraLayer> layers_;
};

void cflora_forward(const CfloraTask& set, const std::vector<int64_t>& offsets, int threads) {
    const nb::gil_scoped_release unlocked;
    rellax::cflora_forward(set.task, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, threads);
}

void cflora_backward(const CfloraTask& set, Address dh, Address z, const Addresses& dgate,
                     const std::vector<int64_t>& offsets, int threads) {
    rellax::Cflora task = set.task;
    task.dh = at<float>(dh);
    task.z = at<float>(z);
    std::vector<float*> dgates;
    for (const Address address : dgate) dgates.push_back(at<float>(address));
    const nb::gil_scoped_release unlocked;
    rellax::cflora_backward(task, offsets.data(), static_cast<int64_t>(offsets.size()) - 1,
                            dgates.empty() ? nullptr : dgates.data(), threads);
}

void cflora_outer(const char* dtype, int64_t tokens, int64_t components, int64_t d, Address left, int64_t left_stride,
                  Address right, int64_t right_stride, const rellax::Dropout& dropout, Address out, int threads) {
    const rellax::CfloraOuter task{dtype_named(dtype), tokens,       components, d,
                                   at<const float>(left), left_stride, at<const void>(right), right_stride,
                                   dropout, at<float>(out)};
    const nb::gil_scoped_release unlocked;
    rellax::cflora_outer(task, threads);
}

void gate_bank_forward(const rellax::GateBank& bank, Address b2, Address flat, int threads) {
    const nb::gil_scoped_release unlocked;
    rellax::gate_bank_forward(bank, at<const void>(b2), at<float>(flat), threads);
}

void gate_bank_backward(const rellax::GateBank& bank, Address dflat, Address du, Address dln_weight,
                        Address dln_bias, Address dw1, Address db1, Address dw2, Address db2, int threads) {
    const rellax::GateBankGradients gradients{at<const float>(dflat), at<float>(du), at<void>(dln_weight),
                                              at<void>(dln_bias),     at<void>(dw1), at<void>(db1),
                                              at<void>(dw2),          at<void>(db2)};
    const nb::gil_scoped_release unlocked;
    rellax::gate_bank_backward(bank, gradients, threads);
}

void history_topk(Address embeddings, const char* dtype, int64_t count, int64_t dim, Address items, Address offsets, int64_t users,
                  Address target, Address user, Address end, int64_t queries, int64_t k, Address positions,
                  Address scores, int threads) {
    const rellax::HistoryTopk task{at<const void>(embeddings),
                                   dtype_named(dtype),
                                   count,
                                   dim,
                                   at<const int64_t>(items),
                                   at<const int64_t>(offsets),
                                   users,
                                   at<const int64_t>(target),
                                   at<const int64_t>(user),
                                   at<const int64_t>(end),
                                   queries,
                                   k,
                                   at<int64_t>(positions),
                                   at<float>(scores)};
    const nb::gil_scoped_release unlocked;
    rellax::history_topk(task, threads);
}

void soft_prompt(const rellax::Rows& words, const rellax::Rows& soft, float word_scale, Address input_ids,
                 Address soft_index, int64_t tokens, int64_t d, Address out, int threads) {
    const rellax::SoftPrompt task{words,
                                  soft,
                                  word_scale,
                                  at<const int64_t>(input_ids),
                                  at<const int64_t>(soft_index),
                                  tokens,
                                  d,
                                  at<void>(out)};
    const nb::gil_scoped_release unlocked;
    rellax::soft_prompt(task, threads);
}

void row_sums(const rellax::Rows& rows, Address index, float factor, int64_t d, int64_t count, const char* dtype,
              Address out, int threads) {
    const rellax::RowSums task{rows, at<const int64_t>(index), factor, d, count, dtype_named(dtype), at<void>(out)};
    const nb::gil_scoped_release unlocked;
    rellax::row_sums(task, threads);
}

nb::list supported_isas() {
    nb::list names;
    for (const rellax::Level* level : rellax::supported_levels()) names.append(level->name);
    return names;
}

void raise_input_error(const std::exception_ptr& error, void*) {
    try {
        std::rethrow_exception(error);
    } catch (const std::invalid_argument& invalid) {
        PyErr_SetString(nb::module_::import_("rellax.errors").attr("InputError").ptr(), invalid.what());
    }
}

}  // namespace

NB_MODULE(_C, m) {
    nb::register_exception_translator(raise_input_error);
    m.def("isa", [] { return rellax::level().name; }, "The ISA level in use.");
    m.def("supported_isas", supported_isas, "The ISA levels this machine can run, the plainest first.");
    m.def("set_parallel_region", [](Address region) { rellax::set_parallel_region(at<rellax::ParallelRegion>(region)); },
          "region"_a, "Take the threads of the OpenMP runtime whose GOMP_parallel is at this address; 0: one thread.");
    m.def("answer_forward", &answer_forward, nb::kw_only(), "dtype"_a, "n"_a, "d"_a, "vocabulary"_a, "rows"_a,
          "weight"_a, "weight_stride"_a, "bias"_a, "softcap"_a, "lse"_a, "mean"_a, "threads"_a,
          "What a head says about rows, over the memory at these addresses; see csrc/answer.h.");
    nb::class_<rellax::Dropout>(m, "Dropout").def(
        "__init__",
        [](rellax::Dropout* self, Address column, uint32_t seed, int32_t threshold, float factor) {
            new (self) rellax::Dropout{at<const uint32_t>(column), seed, threshold, factor};
        },
        nb::kw_only(), "column"_a = 0, "seed"_a = 0, "threshold"_a = 0, "factor"_a = 1.0f,
        "Which elements are dropped; by default none. csrc/cflora.h says what the fields hold.");
    nb::class_<rellax::CfloraLayer>(m, "CfloraLayer")
        .def(
            "__init__",
            [](rellax::CfloraLayer* self, int64_t d_out, Address rows, int64_t stride, Address base,
               int64_t base_stride, const Factor& a, const Factor& b, Address gate) {
                new (self) rellax::CfloraLayer{
                    d_out, at<void>(rows), stride, at<const void>(base), base_stride,
                    cflora_factor(a), cflora_factor(b), at<const float>(gate), nullptr, nullptr};
            },
            nb::kw_only(), "d_out"_a, "rows"_a, "stride"_a, "base"_a, "base_stride"_a, "a"_a, "b"_a,
            "gate"_a, "A layer over the memory at these addresses; A and B as (address, component, column).");
    nb::class_<CfloraTask>(m, "Cflora")
        .def(nb::init<const char*, int64_t, int64_t, Address, int64_t, bool, std::vector<rellax::CfloraLayer>, float,
                      const rellax::Dropout&, Address>(),
             nb::kw_only(), "dtype"_a, "r"_a, "d_in"_a, "x"_a, "x_stride"_a, "accumulate"_a, "layers"_a, "scale"_a,
             "dropout"_a, "h"_a, "A set of layers over the memory at these addresses; see csrc/cflora.h.");
    m.def("cflora_forward", &cflora_forward, "set"_a, nb::kw_only(), "offsets"_a, "threads"_a,
          "y = base + s · (h G) Bᵀ for each layer of a set.");
    m.def("cflora_backward", &cflora_backward, "set"_a, nb::kw_only(), "dh"_a, "z"_a, "dgate"_a, "offsets"_a,
          "threads"_a, "dx += drop(dh A), and each layer's dG, dh and z.");
    m.def("cflora_outer", &cflora_outer, nb::kw_only(), "dtype"_a, "tokens"_a, "components"_a, "d"_a, "left"_a,
          "left_stride"_a, "right"_a, "right_stride"_a, "dropout"_a, "out"_a, "threads"_a,
          "leftᵀ drop(right) over the memory at these addresses; see csrc/cflora.h.");
    nb::class_<rellax::GateBank>(m, "GateBank")
        .def(
            "__init__",
            [](rellax::GateBank* self, const char* dtype, int64_t projections, int64_t instances, int64_t d_u,
               int64_t hidden, int64_t outputs, Address u, float eps, Address ln_weight, Address ln_bias, Address w1,
               Address b1, Address w2) {
                new (self) rellax::GateBank{dtype_named(dtype),        projections,
                                            instances,                 d_u,
                                            hidden,                    outputs,
                                            at<const float>(u),        eps,
                                            at<const void>(ln_weight), at<const void>(ln_bias),
                                            at<const void>(w1),        at<const void>(b1),
                                            at<const void>(w2)};
            },
            nb::kw_only(), "dtype"_a, "projections"_a, "instances"_a, "d_u"_a, "hidden"_a, "outputs"_a, "u"_a, "eps"_a,
            "ln_weight"_a, "ln_bias"_a, "w1"_a, "b1"_a, "w2"_a,
            "What the forward and the backward pass read. csrc/gate_bank.h says what the fields hold.");
    m.def("gate_bank_forward", &gate_bank_forward, "bank"_a, nb::kw_only(), "b2"_a, "flat"_a, "threads"_a,
          "The flat gates (M, B, n) into the memory at this address; see csrc/gate_bank.h.");
    m.def("gate_bank_backward", &gate_bank_backward, "bank"_a, nb::kw_only(), "dflat"_a, "du"_a, "dln_weight"_a,
          "dln_bias"_a, "dw1"_a, "db1"_a, "dw2"_a, "db2"_a, "threads"_a,
          "All gradients into the memory at these addresses; see csrc/gate_bank.h.");
    m.def("history_topk", &history_topk, nb::kw_only(), "embeddings"_a, "dtype"_a, "count"_a, "dim"_a, "items"_a,
          "offsets"_a, "users"_a, "target"_a, "user"_a, "end"_a, "queries"_a, "k"_a, "positions"_a, "scores"_a, "threads"_a,
          "history_topk over the memory at these addresses; see csrc/history_topk.h for what they hold.");
    nb::class_<rellax::ItemTopkSearch>(m, "ItemTopk")
        .def(
            "__init__",
            [](rellax::ItemTopkSearch* self, Address embeddings, const char* dtype, int64_t items, int64_t dim,
               Address query, int64_t queries, int64_t k, bool exclude_self, Address indices, Address scores,
               int threads) {
                const rellax::ItemTopk task{at<const void>(embeddings), dtype_named(dtype),   items,
                                            dim,                        at<const int64_t>(query), queries,
                                            k,                          exclude_self,         at<int64_t>(indices),
                                            at<float>(scores)};
                new (self) rellax::ItemTopkSearch(task, threads);
            },
            nb::kw_only(), "embeddings"_a, "dtype"_a, "items"_a, "dim"_a, "query"_a, "queries"_a, "k"_a,
            "exclude_self"_a, "indices"_a, "scores"_a, "threads"_a,
            "item_topk over the memory at these addresses; see csrc/item_topk.h for what they hold.")
        .def("step", &rellax::ItemTopkSearch::step, nb::call_guard<nb::gil_scoped_release>(),
             "Take the next step; False where there was none left.");
    nb::class_<rellax::Rows>(m, "Rows").def(
        "__init__",
        [](rellax::Rows* self, Address data, const char* dtype, int64_t count, int64_t stride) {
            new (self) rellax::Rows{at<const void>(data), dtype_named(dtype), count, stride};
        },
        nb::kw_only(), "data"_a, "dtype"_a, "count"_a, "stride"_a,
        "Rows of a table. csrc/soft_prompt.h says what the fields hold.");
    m.def("soft_prompt", &soft_prompt, nb::kw_only(), "words"_a, "soft"_a, "word_scale"_a, "input_ids"_a,
          "soft_index"_a, "tokens"_a, "d"_a, "out"_a, "threads"_a,
          "The tokens' embeddings over the memory at these addresses; see csrc/soft_prompt.h.");
    m.def("row_sums", &row_sums, nb::kw_only(), "rows"_a, "index"_a, "factor"_a, "d"_a, "count"_a, "dtype"_a, "out"_a,
          "threads"_a, "Sums of rows by index over the memory at these addresses; see csrc/soft_prompt.h.");
}
