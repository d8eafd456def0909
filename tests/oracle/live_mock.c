// Mock backends for the real ggml scheduler: of the abilities that a case asks for, and every call made on them noted.
//
// A note is a line of JSON in a log (FORMAT.md, section 2, CALL). The first part restates the binary layout of ggml's
// private tables, backend API version 2 (ggml 0.20 and 0.21) or 3 (since 0.26), chosen by -DBACKEND_API=N; all else uses
// the public headers only. The numbers of ops are asked for, as they change from version to version.

#define _GNU_SOURCE
#include "ggml-backend.h"
#include "ggml.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define NAME_SIZE 64
#define MAX_OPS 256
#define MAX_TYPES 64

// ---- layouts --------------------------------------------------------------------------------------------------------

struct ggml_backend_buffer_type {
    const char * (*get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t, size_t);
#if BACKEND_API >= 3
    void * alloc_buffer_n;
#endif
    size_t (*get_alignment)(ggml_backend_buffer_type_t);
    size_t (*get_max_size)(ggml_backend_buffer_type_t);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t, const struct ggml_tensor *);
#if BACKEND_API >= 3
    void * get_alloc_size_n;
#endif
    bool (*is_host)(ggml_backend_buffer_type_t);
    ggml_backend_dev_t device;
    void * context;
};

typedef struct {
    void (*free_buffer)(ggml_backend_buffer_t);
    void * (*get_base)(ggml_backend_buffer_t);
    enum ggml_status (*init_tensor)(ggml_backend_buffer_t, struct ggml_tensor *);
    void (*memset_tensor)(ggml_backend_buffer_t, struct ggml_tensor *, uint8_t, size_t, size_t);
    void (*set_tensor)(ggml_backend_buffer_t, struct ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor)(ggml_backend_buffer_t, const struct ggml_tensor *, void *, size_t, size_t);
    void * set_tensor_2d;
    void * get_tensor_2d;
    bool (*cpy_tensor)(ggml_backend_buffer_t, const struct ggml_tensor *, struct ggml_tensor *);
    void (*clear)(ggml_backend_buffer_t, uint8_t);
    void (*reset)(ggml_backend_buffer_t);
} buffer_iface;

struct ggml_backend_buffer {
    buffer_iface iface;
    ggml_backend_buffer_type_t buft;
    void * context;
    size_t size;
    int usage;
};

extern ggml_backend_buffer_t ggml_backend_buffer_init(ggml_backend_buffer_type_t, buffer_iface, void *, size_t);

typedef struct {
    void (*add_alloc_dep)(void *, struct ggml_tensor *, struct ggml_tensor *);
    void * user;
} optimize_params;

struct ggml_backend {
    ggml_guid_t guid;
    const char * (*get_name)(ggml_backend_t);
    void (*free)(ggml_backend_t);
    void (*set_tensor_async)(ggml_backend_t, struct ggml_tensor *, const void *, size_t, size_t);
    void (*get_tensor_async)(ggml_backend_t, const struct ggml_tensor *, void *, size_t, size_t);
    void * set_tensor_2d_async;
    void * get_tensor_2d_async;
    bool (*cpy_tensor_async)(ggml_backend_t, ggml_backend_t, const struct ggml_tensor *, struct ggml_tensor *);
    void (*synchronize)(ggml_backend_t);
    void * plan_create;
    void * plan_free;
    void * plan_update;
    void * plan_compute;
    enum ggml_status (*graph_compute)(ggml_backend_t, struct ggml_cgraph *);
    void (*event_record)(ggml_backend_t, ggml_backend_event_t);
    void (*event_wait)(ggml_backend_t, ggml_backend_event_t);
    void (*graph_optimize)(ggml_backend_t, struct ggml_cgraph *, optimize_params *); // API 2 gives no third
    ggml_backend_dev_t device;
    void * context;
};

struct ggml_backend_event {
    ggml_backend_dev_t device;
    void * context;
};

struct ggml_backend_device {
    const char * (*get_name)(ggml_backend_dev_t);
    const char * (*get_description)(ggml_backend_dev_t);
    void (*get_memory)(ggml_backend_dev_t, size_t *, size_t *);
    enum ggml_backend_dev_type (*get_type)(ggml_backend_dev_t);
    void (*get_props)(ggml_backend_dev_t, struct ggml_backend_dev_props *);
    void * init_backend;
    ggml_backend_buffer_type_t (*get_buffer_type)(ggml_backend_dev_t);
    void * get_host_buffer_type;
    void * buffer_from_host_ptr;
    bool (*supports_op)(ggml_backend_dev_t, const struct ggml_tensor *);
    bool (*supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    bool (*offload_op)(ggml_backend_dev_t, const struct ggml_tensor *);
    ggml_backend_event_t (*event_new)(ggml_backend_dev_t);
    void (*event_free)(ggml_backend_dev_t, ggml_backend_event_t);
    void (*event_synchronize)(ggml_backend_dev_t, ggml_backend_event_t);
    ggml_backend_reg_t reg;
    void * context;
};

// ---- what a case asks for (filled in by live_run.py, which declares the same structs) ---------------------------------

typedef struct {
    char name[NAME_SIZE];
    int index;
    int is_host;
    size_t alignment;
    size_t max_size;       // 0: no such callback
    size_t quant_row;      // 0: none; as are the next three
    size_t extra;
    size_t round_to;
    size_t alloc_limit;
    int has_cpy;
    uint64_t cpy_from;     // a bit per buffer type
} mock_buft;

typedef struct {
    char name[NAME_SIZE];
    int index;
    int type;
    int buft;
    uint64_t bufts;        // a bit per buffer type
    uint8_t op_ok[MAX_OPS];
    uint8_t op_wanted[MAX_OPS];
    int64_t op_min_batch[MAX_OPS];
    uint8_t src0_type_bad[MAX_TYPES];
    int64_t offload_min_batch;
    int has_offload, has_sync, has_set, has_get, has_cpy, has_events, has_optimize;
    uint64_t cpy_from;
    char fail_node[NAME_SIZE]; // empty: never fails
    int fail_status;
    int fail_times;        // below 0: every time
    int n_order;
    char (*order)[NAME_SIZE];
    int n_keep;
    char (*keep)[NAME_SIZE]; // pairs: a tensor, and until when
    int n_events;          // made so far
    struct ggml_backend_device device;
    struct ggml_backend backend;
} mock_backend;

// ---- log ------------------------------------------------------------------------------------------------------------

static char * log_text;
static size_t log_len, log_cap;
static int is_quiet;

static void note(const char * fmt, ...) {
    if (is_quiet) return;
    for (;;) {
        va_list ap;
        va_start(ap, fmt);
        int n = vsnprintf(log_text + log_len, log_cap - log_len, fmt, ap);
        va_end(ap);
        if (log_len + (size_t) n < log_cap) {
            log_len += (size_t) n;
            return;
        }
        log_cap = 2 * log_cap + (size_t) n + 4096;
        log_text = realloc(log_text, log_cap);
    }
}
EXPORT const char * mock_log_text(void) { return log_text; }
EXPORT size_t mock_log_len(void) { return log_len; }
EXPORT void mock_log_clear(void) { log_len = 0; }

static void drop_message(enum ggml_log_level level, const char * text, void * user) {
    (void) level; (void) text; (void) user;
}
EXPORT void mock_silence(void) { ggml_log_set(drop_message, NULL); }

// ---- buffers --------------------------------------------------------------------------------------------------------

typedef struct {
    char label[NAME_SIZE + 16];
    char * base;
    size_t map_size;
} memory;

#define MAX_LIVE 4096
static ggml_backend_buffer_t live[MAX_LIVE];
static int n_live;
static const char * next_label; // of the next buffer; NULL: "@" and the buffer type

static mock_buft * spec_of(ggml_backend_buffer_type_t b) { return b->context; }
static memory * memory_of(ggml_backend_buffer_t b) { return b->context; }

static const char * buft_name(ggml_backend_buffer_type_t b) { return spec_of(b)->name; }
static size_t buft_alignment(ggml_backend_buffer_type_t b) { return spec_of(b)->alignment; }
static size_t buft_max_size(ggml_backend_buffer_type_t b) { return spec_of(b)->max_size; }
static bool buft_is_host(ggml_backend_buffer_type_t b) { return spec_of(b)->is_host; }

static size_t buft_alloc_size(ggml_backend_buffer_type_t b, const struct ggml_tensor * t) {
    mock_buft * c = spec_of(b);
    size_t size = ggml_nbytes(t);
    if (c->quant_row && ggml_is_quantized(t->type) && t->ne[0] % (int64_t) c->quant_row) {
        size += ggml_row_size(t->type, (int64_t) c->quant_row - t->ne[0] % (int64_t) c->quant_row);
    }
    size += c->extra;
    return c->round_to > 1 ? (size + c->round_to - 1) / c->round_to * c->round_to : size;
}

// bytes of int32 tensors alone are really copied: they hold the ids; the rest would cost memory for nothing
static int has_bytes(const struct ggml_tensor * t) { return t->type == GGML_TYPE_I32; }

static ggml_backend_buffer_t storage(const struct ggml_tensor * t) { return t->view_src ? t->view_src->buffer : t->buffer; }

static const char * place_of(const void * p) {
    static char text[NAME_SIZE + 64];
    for (int i = 0; i < n_live; i++) {
        memory * m = memory_of(live[i]);
        if ((const char *) p >= m->base && (const char *) p < m->base + m->map_size) {
            snprintf(text, sizeof text, "\"%s\",%zu", m->label, (size_t) ((const char *) p - m->base));
            return text;
        }
    }
    return "null,0";
}

static void buf_free(ggml_backend_buffer_t b) {
    note("[\"free\",\"%s\",%zu]\n", memory_of(b)->label, b->size);
    for (int i = 0; i < n_live; i++) {
        if (live[i] == b) {
            live[i] = live[--n_live];
            break;
        }
    }
    munmap(memory_of(b)->base, memory_of(b)->map_size);
    free(b->context);
}
static void * buf_base(ggml_backend_buffer_t b) { return memory_of(b)->base; }

static void buf_set(ggml_backend_buffer_t b, struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    note("[\"buf_set\",\"%s\",\"%s\",%zu,%zu,[%s]]\n", memory_of(b)->label, t->name, offset, size, place_of(data));
    if (has_bytes(t)) memcpy((char *) t->data + offset, data, size);
}
static void buf_get(ggml_backend_buffer_t b, const struct ggml_tensor * t, void * data, size_t offset, size_t size) {
    note("[\"buf_get\",\"%s\",\"%s\",%zu,%zu]\n", memory_of(b)->label, t->name, offset, size);
    if (has_bytes(t)) memcpy(data, (const char *) t->data + offset, size);
}
static bool buf_cpy(ggml_backend_buffer_t b, const struct ggml_tensor * src, struct ggml_tensor * dst) {
    bool ok = (spec_of(b->buft)->cpy_from >> spec_of(storage(src)->buft)->index) & 1;
    note("[\"buf_cpy\",\"%s\",\"%s\",\"%s\",%s]\n", memory_of(b)->label, src->name, dst->name, ok ? "true" : "false");
    if (ok && has_bytes(src)) memcpy(dst->data, src->data, ggml_nbytes(src));
    return ok;
}
static void buf_memset(ggml_backend_buffer_t b, struct ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    note("[\"buf_memset\",\"%s\",\"%s\",%zu,%zu,%d]\n", memory_of(b)->label, t->name, offset, size, value);
    if (has_bytes(t)) memset((char *) t->data + offset, value, size);
}
static void buf_clear(ggml_backend_buffer_t b, uint8_t value) { note("[\"buf_clear\",\"%s\",%d]\n", memory_of(b)->label, value); }

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t b, size_t size) {
    mock_buft * c = spec_of(b);
    int fails = c->alloc_limit && size > c->alloc_limit;
    note("[\"alloc\",\"%s\",%zu,%s]\n", c->name, size, fails ? "false" : "true");
    if (fails || n_live == MAX_LIVE) return NULL;
    // address space without memory behind it, until written to; cut so that the base has the alignment
    size_t map_size = (size + 0xffff) & ~(size_t) 0xffff, alignment = c->alignment < 4096 ? 4096 : c->alignment;
    char * p = mmap(NULL, map_size + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        fprintf(stderr, "live_mock: no address space for %zu bytes\n", size);
        _exit(3);
    }
    memory * m = calloc(1, sizeof *m);
    m->base = (char *) (((uintptr_t) p + alignment - 1) / alignment * alignment);
    m->map_size = map_size;
    snprintf(m->label, sizeof m->label, "%s%s", next_label ? "" : "@", next_label ? next_label : c->name);
    buffer_iface iface = {
        .free_buffer = buf_free, .get_base = buf_base, .memset_tensor = buf_memset, .set_tensor = buf_set,
        .get_tensor = buf_get, .cpy_tensor = c->has_cpy ? buf_cpy : NULL, .clear = buf_clear,
    };
    return live[n_live++] = ggml_backend_buffer_init(b, iface, m, size);
}

EXPORT ggml_backend_buffer_type_t mock_buft_new(mock_buft * c) {
    ggml_backend_buffer_type_t b = calloc(1, sizeof *b);
    b->get_name = buft_name;
    b->alloc_buffer = buft_alloc;
    b->get_alignment = buft_alignment;
    b->get_max_size = c->max_size ? buft_max_size : NULL;
    b->get_alloc_size = c->quant_row || c->extra || c->round_to > 1 ? buft_alloc_size : NULL;
    b->is_host = c->is_host ? buft_is_host : NULL;
    b->context = c;
    return b;
}

// a buffer that was there before the scheduler: not noted
EXPORT ggml_backend_buffer_t mock_static_buffer(ggml_backend_buffer_type_t b, const char * label, size_t size, int usage) {
    is_quiet = 1;
    next_label = label;
    ggml_backend_buffer_t made = buft_alloc(b, size ? size : 1);
    next_label = NULL;
    is_quiet = 0;
    made->usage = usage;
    return made;
}

// ---- devices and backends ---------------------------------------------------------------------------------------------

typedef struct {
    int backend;
    int k;
} event;

static mock_backend * of_device(ggml_backend_dev_t d) { return d->context; }
static mock_backend * of_backend(ggml_backend_t b) { return b->context; }
static ggml_backend_buffer_type_t * all_bufts;

// numbers of the ops that are looked at
static enum ggml_op OP_NONE, OP_VIEW, OP_RESHAPE, OP_PERMUTE, OP_TRANSPOSE;
static enum ggml_op OP_GET_ROWS, OP_MUL_MAT, OP_MUL_MAT_ID, OP_ROPE, OP_ROPE_BACK;

EXPORT void mock_op(int number, const char * name) {
#define IS(op) if (strcmp(name, #op) == 0) OP_##op = (enum ggml_op) number
    IS(NONE); IS(VIEW); IS(RESHAPE); IS(PERMUTE); IS(TRANSPOSE);
    IS(GET_ROWS); IS(MUL_MAT); IS(MUL_MAT_ID); IS(ROPE); IS(ROPE_BACK);
#undef IS
}

static int64_t batch_size(const struct ggml_tensor * t) {
    if (t->op == OP_GET_ROWS) return 0;
    if (t->op == OP_MUL_MAT) return t->ne[1];
    if (t->op == OP_MUL_MAT_ID || t->op == OP_ROPE || t->op == OP_ROPE_BACK) return t->ne[2];
    return t->ne[1] * t->ne[2] * t->ne[3];
}

static int is_empty_op(enum ggml_op op) {
    return op == OP_NONE || op == OP_VIEW || op == OP_RESHAPE || op == OP_PERMUTE || op == OP_TRANSPOSE;
}

static const char * dev_name(ggml_backend_dev_t d) { return of_device(d)->name; }
static void dev_memory(ggml_backend_dev_t d, size_t * unused, size_t * total) { (void) d; *unused = *total = 0; }
static enum ggml_backend_dev_type dev_type(ggml_backend_dev_t d) { return of_device(d)->type; }
static void dev_props(ggml_backend_dev_t d, struct ggml_backend_dev_props * p) {
    memset(p, 0, sizeof *p);
    p->name = p->description = of_device(d)->name;
    p->type = of_device(d)->type;
}
static ggml_backend_buffer_type_t dev_buft(ggml_backend_dev_t d) { return all_bufts[of_device(d)->buft]; }
static bool dev_supports_op(ggml_backend_dev_t d, const struct ggml_tensor * t) {
    mock_backend * c = of_device(d);
    if (!c->op_ok[t->op] || (c->op_min_batch[t->op] && batch_size(t) < c->op_min_batch[t->op])) return false;
    return is_empty_op(t->op) || !t->src[0] || !c->src0_type_bad[t->src[0]->type];
}
static bool dev_supports_buft(ggml_backend_dev_t d, ggml_backend_buffer_type_t b) { return (of_device(d)->bufts >> spec_of(b)->index) & 1; }
static bool dev_offload_op(ggml_backend_dev_t d, const struct ggml_tensor * t) {
    return of_device(d)->op_wanted[t->op] && batch_size(t) >= of_device(d)->offload_min_batch;
}

static ggml_backend_event_t event_new(ggml_backend_dev_t d) {
    ggml_backend_event_t made = calloc(1, sizeof *made);
    event * e = calloc(1, sizeof *e);
    e->backend = of_device(d)->index;
    e->k = of_device(d)->n_events++;
    made->device = d;
    made->context = e;
    note("[\"event_new\",%d,%d]\n", e->backend, e->k);
    return made;
}
static void event_free(ggml_backend_dev_t d, ggml_backend_event_t e) {
    (void) d;
    free(e->context);
    free(e);
}
static void event_sync(ggml_backend_dev_t d, ggml_backend_event_t e) {
    (void) d;
    event * x = e->context;
    note("[\"event_sync\",%d,%d]\n", x->backend, x->k);
}
static void note_event(const char * what, ggml_backend_t b, ggml_backend_event_t e) {
    event * x = e->context;
    note("[\"%s\",%d,%d,%d]\n", what, of_backend(b)->index, x->backend, x->k);
}
static void be_record(ggml_backend_t b, ggml_backend_event_t e) { note_event("event_record", b, e); }
static void be_wait(ggml_backend_t b, ggml_backend_event_t e) { note_event("event_wait", b, e); }
static const char * be_name(ggml_backend_t b) { return of_backend(b)->name; }
static void be_free(ggml_backend_t b) { (void) b; }
static void be_sync(ggml_backend_t b) { note("[\"sync\",%d]\n", of_backend(b)->index); }

static void be_set(ggml_backend_t b, struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    note("[\"set_async\",%d,\"%s\",%zu,%zu,[%s]]\n", of_backend(b)->index, t->name, offset, size, place_of(data));
    if (has_bytes(t)) memcpy((char *) t->data + offset, data, size);
}
static void be_get(ggml_backend_t b, const struct ggml_tensor * t, void * data, size_t offset, size_t size) {
    note("[\"get_async\",%d,\"%s\",%zu,%zu]\n", of_backend(b)->index, t->name, offset, size);
    if (has_bytes(t)) memcpy(data, (const char *) t->data + offset, size);
}
static bool be_cpy(ggml_backend_t from, ggml_backend_t to, const struct ggml_tensor * src, struct ggml_tensor * dst) {
    ggml_backend_buffer_t b = storage(src);
    bool ok = b && ((of_backend(to)->cpy_from >> spec_of(b->buft)->index) & 1);
    note("[\"cpy_async\",%d,%d,\"%s\",\"%s\",%s]\n", of_backend(from)->index, of_backend(to)->index, src->name, dst->name,
         ok ? "true" : "false");
    if (ok && has_bytes(src)) memcpy(dst->data, src->data, ggml_nbytes(src));
    return ok;
}

// bytes that appear where a node is computed
typedef struct {
    const struct ggml_tensor * node;
    void * data;
    size_t size;
} result;
static result * results;
static int n_results;

EXPORT void mock_results_clear(void) {
    for (int i = 0; i < n_results; i++) free(results[i].data);
    n_results = 0;
}
EXPORT void mock_result(const struct ggml_tensor * node, const void * data, size_t size) {
    results = realloc(results, (size_t) (n_results + 1) * sizeof *results);
    results[n_results] = (result) { node, memcpy(malloc(size ? size : 1), data, size), size };
    n_results++;
}

static void note_nodes(const char * what, int backend, struct ggml_cgraph * g) {
    note("[\"%s\",%d,[", what, backend);
    for (int i = 0; i < ggml_graph_n_nodes(g); i++) note("%s\"%s\"", i ? "," : "", ggml_graph_node(g, i)->name);
    note("]]\n");
}

static enum ggml_status be_compute(ggml_backend_t b, struct ggml_cgraph * g) {
    mock_backend * c = of_backend(b);
    note_nodes("compute", c->index, g);
    for (int i = 0; c->fail_node[0] && c->fail_times && i < ggml_graph_n_nodes(g); i++) {
        if (strcmp(ggml_graph_node(g, i)->name, c->fail_node) == 0) {
            if (c->fail_times > 0) c->fail_times--;
            return c->fail_status;
        }
    }
    for (int i = 0; n_results && i < ggml_graph_n_nodes(g); i++) {
        struct ggml_tensor * node = ggml_graph_node(g, i);
        for (int j = 0; j < n_results; j++) {
            if (results[j].node == node) memcpy(node->data, results[j].data, results[j].size);
        }
    }
    return GGML_STATUS_SUCCESS;
}

static int is_ordered(const mock_backend * c, const struct ggml_tensor * t) {
    for (int k = 0; k < c->n_order; k++) {
        if (strcmp(t->name, c->order[k]) == 0) return 1;
    }
    return 0;
}

// a node, or a source of one
static struct ggml_tensor * find(struct ggml_cgraph * g, const char * name) {
    for (int i = 0; i < ggml_graph_n_nodes(g); i++) {
        if (strcmp(ggml_graph_node(g, i)->name, name) == 0) return ggml_graph_node(g, i);
    }
    for (int i = 0; i < ggml_graph_n_nodes(g); i++) {
        for (int k = 0; k < GGML_MAX_SRC; k++) {
            struct ggml_tensor * src = ggml_graph_node(g, i)->src[k];
            if (src && strcmp(src->name, name) == 0) return src;
        }
    }
    return NULL;
}

// the named nodes, in the order of their names, into the places that they had; then lives are asked for
static void be_optimize(ggml_backend_t b, struct ggml_cgraph * g, optimize_params * params) {
    mock_backend * c = of_backend(b);
    int n = ggml_graph_n_nodes(g), at = 0;
    struct ggml_tensor ** nodes = ggml_graph_nodes(g);
    note_nodes("optimize", c->index, g);
    struct ggml_tensor ** old = malloc((size_t) (n + 1) * sizeof *old);
    memcpy(old, nodes, (size_t) n * sizeof *old);
    for (int k = 0; k < c->n_order; k++) {
        for (int i = 0; i < n; i++) {
            if (strcmp(old[i]->name, c->order[k]) != 0) continue;
            while (!is_ordered(c, old[at])) at++;
            nodes[at++] = old[i];
            break;
        }
    }
    free(old);
#if BACKEND_API >= 3
    for (int k = 0; k < c->n_keep; k++) {
        struct ggml_tensor * kept = find(g, c->keep[2 * k]), * until = find(g, c->keep[2 * k + 1]);
        if (kept && until) params->add_alloc_dep(params->user, kept, until);
    }
#else
    (void) params;
    (void) find;
#endif
}

EXPORT ggml_backend_t mock_backend_new(mock_backend * c, ggml_backend_buffer_type_t * bufts) {
    all_bufts = bufts;
    struct ggml_backend_device * d = &c->device;
    d->get_name = d->get_description = dev_name;
    d->get_memory = dev_memory;
    d->get_type = dev_type;
    d->get_props = dev_props;
    d->get_buffer_type = dev_buft;
    d->supports_op = dev_supports_op;
    d->supports_buft = dev_supports_buft;
    d->offload_op = c->has_offload ? dev_offload_op : NULL;
    d->event_new = c->has_events ? event_new : NULL;
    d->event_free = c->has_events ? event_free : NULL;
    d->event_synchronize = c->has_events ? event_sync : NULL;
    d->context = c;
    struct ggml_backend * b = &c->backend;
    b->get_name = be_name;
    b->free = be_free;
    b->set_tensor_async = c->has_set ? be_set : NULL;
    b->get_tensor_async = c->has_get ? be_get : NULL;
    b->cpy_tensor_async = c->has_cpy ? be_cpy : NULL;
    b->synchronize = c->has_sync ? be_sync : NULL;
    b->graph_compute = be_compute;
    b->event_record = c->has_events ? be_record : NULL;
    b->event_wait = c->has_events ? be_wait : NULL;
    b->graph_optimize = c->has_optimize ? be_optimize : NULL;
    b->device = d;
    b->context = c;
    return b;
}
EXPORT size_t mock_backend_size(void) { return sizeof(mock_backend); }

// ---- eval callback ------------------------------------------------------------------------------------------------------

static char (*asked)[NAME_SIZE];
static int n_asked;
static char stop_at[NAME_SIZE];

static bool eval_callback(struct ggml_tensor * t, bool is_question, void * user) {
    (void) user;
    bool answer = !is_question && strcmp(t->name, stop_at) != 0;
    for (int i = 0; is_question && i < n_asked && !answer; i++) answer = strcmp(asked[i], t->name) == 0;
    note("[\"%s\",\"%s\",%s]\n", is_question ? "eval_ask" : "eval_got", t->name, answer ? "true" : "false");
    return answer;
}
// n below 0: no callback
EXPORT void mock_eval_callback(ggml_backend_sched_t sched, const char * names, int n, const char * stop) {
    n_asked = n < 0 ? 0 : n;
    free(asked);
    asked = malloc((size_t) (n_asked + 1) * NAME_SIZE);
    memcpy(asked, names, (size_t) n_asked * NAME_SIZE);
    snprintf(stop_at, sizeof stop_at, "%s", stop);
    ggml_backend_sched_set_eval_callback(sched, n < 0 ? NULL : eval_callback, NULL);
}

// ---- realloc callback ---------------------------------------------------------------------------------------------------

static void on_realloc(ggml_backend_sched_t sched, struct ggml_cgraph * graph, bool ids_changed, bool size_changed, void * user) {
    (void) sched; (void) graph; (void) user;
    note("[\"realloc\",%s,%s]\n", ids_changed ? "true" : "false", size_changed ? "true" : "false");
}
EXPORT void * mock_realloc_callback(void) { return (void *) on_realloc; }
