// Records which experts a model chooses, with stock llama.cpp through its eval callback, as JSON lines that pyggml reads.
//
//   g++ -O2 record_routing.cpp -I llama.cpp/include -I llama.cpp/ggml/include -L llama.cpp/build/bin -lllama -lggml -lggml-base -o record_routing
//   ./record_routing model.gguf "Why is the sky blue?" 64 > routing.jsonl
//
// ffn_moe_topk is a view of all experts sorted: its rows are nb[1] bytes apart, not ne[0] * 4. Reading them flat is the
// mistake that broke three published studies.
#include "ggml-backend.h"
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct recorder {
    int step = 0;
    const char * phase = "prefill";
    int n_expert = 0, n_used = 0;
    std::vector<uint8_t> bytes;
    std::string lines;
};

static bool see(struct ggml_tensor * t, bool ask, void * data) {
    const char * name = ggml_get_name(t);
    const bool wanted = strncmp(name, "ffn_moe_topk-", 13) == 0;
    if (ask || !wanted) {
        return ask ? wanted : true;
    }
    recorder & r = *(recorder *) data;
    const int layer = atoi(name + 13);
    const int64_t n_used = t->ne[0], n_token = t->ne[1];
    r.n_used = (int) n_used;
    if (t->src[0]) {
        r.n_expert = (int) t->src[0]->ne[0];  // of the sorted experts that this is a view of
    }
    r.bytes.resize((n_token - 1) * t->nb[1] + n_used * t->nb[0]);
    ggml_backend_tensor_get(t, r.bytes.data(), 0, r.bytes.size());
    r.lines += "{\"step\": " + std::to_string(r.step) + ", \"phase\": \"" + r.phase + "\", \"layer\": " + std::to_string(layer) + ", \"ids\": [";
    for (int64_t i = 0; i < n_token; i++) {
        r.lines += i ? ", [" : "[";
        for (int64_t j = 0; j < n_used; j++) {
            int32_t id;
            memcpy(&id, r.bytes.data() + i * t->nb[1] + j * t->nb[0], 4);  // by the strides
            r.lines += (j ? ", " : "") + std::to_string(id);
        }
        r.lines += "]";
    }
    r.lines += "]}\n";
    return true;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL PROMPT [TOKENS]\n", argv[0]);
        return 2;
    }
    const int n_predict = argc > 3 ? atoi(argv[3]) : 32;
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const std::string prompt = argv[2];
    std::vector<llama_token> tokens(prompt.size() + 8);
    const int n = llama_tokenize(vocab, prompt.c_str(), (int) prompt.size(), tokens.data(), (int) tokens.size(), true, true);
    if (n < 1) {
        return 1;
    }
    tokens.resize(n);
    recorder r;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = n + n_predict;
    params.n_batch = params.n_ubatch = n > 512 ? n : 512;  // the prompt is one step
    params.cb_eval = see;
    params.cb_eval_user_data = &r;
    llama_context * context = llama_init_from_model(model, params);
    llama_sampler * greedy = llama_sampler_init_greedy();
    if (!context || llama_decode(context, llama_batch_get_one(tokens.data(), n))) {
        return 1;
    }
    for (int i = 0; i < n_predict; i++) {
        llama_token next = llama_sampler_sample(greedy, context, -1);
        if (llama_vocab_is_eog(vocab, next)) {
            break;
        }
        r.step++;
        r.phase = "decode";
        if (llama_decode(context, llama_batch_get_one(&next, 1))) {
            return 1;
        }
    }
    printf("{\"format\": \"pyggml-routing\", \"version\": 1, \"n_layer\": %d, \"n_expert\": %d, \"n_used\": %d}\n",
           llama_model_n_layer(model), r.n_expert, r.n_used);
    fputs(r.lines.c_str(), stdout);
    llama_sampler_free(greedy);
    llama_free(context);
    llama_model_free(model);
    return r.lines.empty();
}
