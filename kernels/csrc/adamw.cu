#include "adamw.h"

#include <algorithm>
#include <cmath>

#include "adamw.cuh"
#include "launch.h"

namespace {

using namespace megapt;

constexpr int kThreads = 256;
constexpr int kTotalThreads = 1024;  // of the one block that adds up what the others left

bool on_a_multiple(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

template <class W>
int launch_adamw(const AdamWShards& shards, const AdamWOptions& options, void* stream) {
    const int64_t grid = std::min<int64_t>(shards.chunks, static_cast<int64_t>(multiprocessors()) * kAdamWBlocks);
    return launch(adamw_kernel<W, kThreads>, dim3(static_cast<unsigned>(grid)), dim3(kThreads), 0, stream, shards,
                  options);
}

int launch_adamw(const AdamWShards& shards, const AdamWOptions& options, bool copies, int dtype, void* stream) {
    if (!copies) return launch_adamw<NoWeights>(shards, options, stream);
    if (dtype == kBFloat16) return launch_adamw<bf16>(shards, options, stream);
    if (dtype == kFloat16) return launch_adamw<fp16>(shards, options, stream);
    return kNoSuchDType;
}

}  // namespace

int megapt_adamw_step(int64_t shards, float* const* masters, const float* const* grads, float* const* exp_avgs,
                      float* const* exp_avg_sqs, void* const* weights, const int64_t* sizes, const double* rates,
                      const double* decays, double beta1, double beta2, double eps, const float* step,
                      const float* scale, const float* skip, int dtype, void* stream) {
    AdamWOptions options = {};
    options.log_beta1 = std::log(beta1), options.log_beta2 = std::log(beta2);
    options.take1 = static_cast<float>(1. - beta1), options.take2 = static_cast<float>(1. - beta2);
    options.beta2 = static_cast<float>(beta2), options.eps = static_cast<float>(eps);
    options.step = step, options.scale = scale, options.skip = skip;
    AdamWShards together = {};
    for (int64_t i = 0; i < shards; ++i) {
        if (sizes[i] > 0) {
            AdamWShard& s = together.shard[together.count++];
            s.master = masters[i], s.grad = grads[i], s.exp_avg = exp_avgs[i], s.exp_avg_sq = exp_avg_sqs[i];
            s.weights = weights ? weights[i] : nullptr;
            s.size = sizes[i], s.first_chunk = together.chunks;
            s.rate = static_cast<float>(rates[i]), s.kept = static_cast<float>(1. - rates[i] * decays[i]);
            s.aligned = on_a_multiple(s.master, 16) && on_a_multiple(s.grad, 16) && on_a_multiple(s.exp_avg, 16) &&
                        on_a_multiple(s.exp_avg_sq, 16) && on_a_multiple(s.weights, 8);
            together.chunks += pieces(sizes[i], kAdamWChunk);
        }
        if (together.count == kAdamWShards || (i + 1 == shards && together.count > 0)) {
            if (const int code = launch_adamw(together, options, weights != nullptr, dtype, stream)) return code;
            together = {};
        }
    }
    return 0;
}

int64_t megapt_squared_norm_partials(int64_t tensors, const int64_t* sizes) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < tensors; ++i) chunks += pieces(sizes[i], kNormChunk);
    return chunks;
}

int megapt_squared_norm(int64_t tensors, const float* const* data, const int64_t* sizes, double* partials, double* out,
                        void* stream) {
    NormTensors together = {};
    int64_t chunks = 0, done = 0;  // of this launch, of those before it
    for (int64_t i = 0; i < tensors; ++i) {
        if (sizes[i] > 0) {
            together.tensor[together.count] = data[i], together.size[together.count] = sizes[i];
            together.first_chunk[together.count++] = chunks;
            chunks += pieces(sizes[i], kNormChunk);
        }
        if (together.count == kNormTensors || (i + 1 == tensors && together.count > 0)) {
            const dim3 grid(static_cast<unsigned>(chunks));
            const int code =
                launch(squares_kernel<kThreads>, grid, dim3(kThreads), 0, stream, together, partials + done);
            if (code) return code;
            done += chunks, chunks = 0;
            together = {};
        }
    }
    return launch(total_kernel<kTotalThreads>, dim3(1), dim3(kTotalThreads), 0, stream, partials, done, out);
}
