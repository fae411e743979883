/* The machine: runs the threads of a launch one after the other, and checks every access to memory.

   A thread runs to its next barrier. When all threads of its block have come there, they go on: what lies between two
   barriers is an interval. Two threads that reach the same memory in one interval, or from two blocks, race if one of
   them writes. The first fault ends the launch. */
#include "machine.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#define SEVERAL 0xffffffffu /* in place of the one thread that has read */

typedef struct {
    b32 writer, written; /* the last thread that wrote, counted from 1, and the interval in which it did */
    b32 reader, read;
    b32 elsewhere; /* whether a block before this one has read it */
} Trace;

typedef struct {
    b64 start, end;
    Trace *traces; /* of every unit of it */
} Range;

typedef int (*Find)(b64 address, b64 *start, b64 *end); /* the array in which an address lies */

static struct {
    const Kernel *kernel;
    Find find;
    char *message;
    jmp_buf stop;
    b32 interval, first; /* the number of this interval, and of the first one of this block */
    Range ranges[4096];  /* those reached so far; the first is the shared memory */
    b32 count, last;
    uint8_t *shared;
} now;

static void fail(const Thread *thread, const char *what, b32 site) {
    snprintf(now.message, 512, "%s: thread %u of block %u: %s", what, thread->tid, thread->ctaid, now.kernel->sites[site]);
    longjmp(now.stop, 1);
}

static void unwritten(const Thread *thread, b32 site) { fail(thread, "reads what was never written", site); }

static int by_another(b32 who, b32 when, b32 me) {
    return who && (when < now.first || (when == now.interval && who != me));
}

static void note(Trace *trace, const Thread *thread, int writes, b32 site) {
    b32 me = thread->tid + 1;
    if (by_another(trace->writer, trace->written, me)) fail(thread, writes ? "race of writes" : "race: reads", site);
    if (writes) {
        if (trace->elsewhere || by_another(trace->reader, trace->read, me)) fail(thread, "race: writes", site);
        trace->writer = me;
        trace->written = now.interval;
    } else {
        trace->elsewhere |= trace->reader && trace->read < now.first;
        trace->reader = by_another(trace->reader, trace->read, me) ? SEVERAL : me;
        trace->read = now.interval;
    }
}

static Trace *traces_of(b64 size) { return calloc(size / now.kernel->unit + 2, sizeof(Trace)); }

static Range *range_of(b64 address) {
    for (b32 k = 0; k < now.count; k++) {
        Range *range = &now.ranges[(now.last + k) % now.count];
        if (address >= range->start && address < range->end) {
            now.last = range - now.ranges;
            return range;
        }
    }
    Range found;
    if (now.count == sizeof now.ranges / sizeof *now.ranges || !now.find(address, &found.start, &found.end)) return NULL;
    found.traces = traces_of(found.end - found.start);
    now.last = now.count;
    now.ranges[now.count] = found;
    return &now.ranges[now.count++];
}

static uint8_t *reach(const Thread *thread, b64 address, b32 size, int writes, b32 site) {
    Range *range = range_of(address);
    if (!range || address + size > range->end) fail(thread, writes ? "writes out of bounds" : "reads out of bounds", site);
    if (address % size) fail(thread, writes ? "writes at a misaligned address" : "reads at a misaligned address", site);
    for (b64 at = address; at < address + size; at += now.kernel->unit)
        note(&range->traces[(at - range->start) / now.kernel->unit], thread, writes, site);
    return range->start == SHARED ? now.shared + (address - SHARED) : (uint8_t *)address;
}

/* Run one block; `threads` are those of the launch, in the order in which they run. */
static void run_block(Thread *threads, b32 count) {
    const Kernel *kernel = now.kernel;
    now.first = ++now.interval;
    memset(now.ranges[0].traces, 0, (kernel->shared / kernel->unit + 2) * sizeof(Trace));
    for (b32 k = 0; k < kernel->shared; k += 4) memcpy(now.shared + k, &(b32){UNWRITTEN32}, 4);
    for (b32 k = 0; k < count; k++) threads[k].barrier = 0;
    for (;;) {
        b32 waiting = 0, any = 0;
        for (b32 k = 0; k < count; k++) {
            threads[k].barrier = kernel->body(&threads[k]);
            waiting += threads[k].barrier > 0;
            if (threads[k].barrier) any |= threads[k].vote;
            if (!threads[k].barrier != !threads[0].barrier) fail(&threads[k], "a barrier is not reached by all threads", 0);
            if (threads[k].barrier != threads[0].barrier) fail(&threads[k], "threads wait at different barriers", 0);
        }
        if (!waiting) return;
        for (b32 k = 0; k < count; k++) threads[k].vote = any;
        now.interval++;
    }
}

/* Launch a kernel. Returns 0, or 1 with what went wrong in `message`, of 512 bytes. */
int launch(const Kernel *kernel, b32 blocks, b32 count, const b64 *arguments, b32 given, int backwards, Find find,
           char *message) {
    if (given != kernel->arguments) {
        snprintf(message, 512, "%u arguments, the kernel has %u", given, kernel->arguments);
        return 1;
    }
    now.kernel = kernel;
    now.find = find;
    now.message = message;
    now.interval = 0;
    now.count = 1;
    now.last = 0;
    now.ranges[0] = (Range){SHARED, SHARED + kernel->shared, traces_of(kernel->shared)};
    now.shared = malloc(kernel->shared + 16);
    uint8_t buffer[8 * 64];
    for (b32 k = 0; k < given; k++) memcpy(buffer + kernel->offsets[k], &arguments[k], kernel->sizes[k]);
    Thread *threads = calloc(count, sizeof(Thread));
    uint8_t *registers = calloc(count, kernel->registers + 16);
    volatile int failed = setjmp(now.stop);
    for (b32 b = 0; b < blocks && !failed; b++) {
        for (b32 k = 0; k < count; k++)
            threads[k] = (Thread){.tid = backwards ? count - 1 - k : k, .ntid = count,
                                  .ctaid = backwards ? blocks - 1 - b : b, .nctaid = blocks, .arguments = buffer,
                                  .registers = registers + (size_t)k * ((kernel->registers + 15) / 16 * 16),
                                  .reach = reach, .unwritten = unwritten};
        run_block(threads, count);
    }
    for (b32 k = 0; k < now.count; k++) free(now.ranges[k].traces);
    free(now.shared);
    free(threads);
    free(registers);
    return failed;
}
