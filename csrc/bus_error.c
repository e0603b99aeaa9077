/* bus_error.c: a mapped file that shrinks, or whose disk or memory fails, becomes a SIGBUS in the middle of a kernel.
 * The handler says in one line which file and unit that was, and ends the process. It and all that it calls are
 * async-signal-safe: no allocation, no lock, no stdio. A kernel that gets no memory ends the process the same way.
 *
 * The list of mapped files and the handler belong to the process, as mappings and signals do.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "context.h"

/* The launcher needs this long to pass the line on before it is told that the process has ended. */
#define FORWARD_MS 500

static pthread_mutex_t writers = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(dm_mapped_file *) first_file;
static struct {
    char before[512];
    int delay_ms, exit_code, abort_fd;
    struct sigaction previous;
    atomic_flag taken;
} ending = {.before = "dist-moe: error: ", .exit_code = 2, .abort_fd = -1, .taken = ATOMIC_FLAG_INIT};

/* A text that is cut where its buffer ends, always with a 0 at the end. */
typedef struct text {
    char *at, *end;
} text;

static void put(text *to, const char *from, size_t length) {
    for (size_t i = 0; i < length && to->at + 1 < to->end; i++) *to->at++ = from[i];
    *to->at = 0;
}

static void put_string(text *to, const char *from) { put(to, from, strlen(from)); }

static void put_number(text *to, uint64_t number) {
    char digits[20];
    size_t first = sizeof digits;
    do digits[--first] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    put(to, digits + first, sizeof digits - first);
}

/* The label's first % stands for the unit, or for the expert if a second one is to be its chunk. */
static void put_label(text *to, const dm_mapped_tensor *tensor, uintptr_t address) {
    uint64_t numbers[2] = {0, 0};
    if (tensor->unit_R != NULL) {
        uint64_t unit = (uint64_t)tensor->unit_R[(address - (uintptr_t)tensor->first) / tensor->row_bytes];
        numbers[0] = unit / tensor->units_per_expert;
        numbers[1] = unit % tensor->units_per_expert;
    }
    size_t next = 0;
    for (const char *c = tensor->label; *c != 0; c++) {
        if (*c == '%' && next < 2) {
            put_number(to, numbers[next++]);
        } else {
            put(to, c, 1);
        }
    }
}

static int within(uintptr_t address, const void *first, size_t bytes) {
    return address >= (uintptr_t)first && address - (uintptr_t)first < bytes;
}

int dm_describe_address(char *out, size_t out_bytes, const void *at) {
    uintptr_t address = (uintptr_t)at;
    text to = {out, out + out_bytes};
    dm_mapped_file *file = atomic_load(&first_file);
    while (file != NULL && !within(address, file->first, file->bytes)) file = file->next;
    if (file == NULL) return 0;
    put_string(&to, file->path);
    for (size_t i = 0; i < file->tensor_count; i++) {
        const dm_mapped_tensor *tensor = &file->tensors[i];
        if (!within(address, tensor->first, tensor->bytes)) continue;
        put_string(&to, ": ");
        put_label(&to, tensor, address);
        break;
    }
    return 1;
}

void dm_mapped_file_add(dm_mapped_file *file) {
    pthread_mutex_lock(&writers);
    file->next = atomic_load(&first_file);
    atomic_store(&first_file, file);
    pthread_mutex_unlock(&writers);
}

void dm_mapped_file_remove(dm_mapped_file *file) {
    pthread_mutex_lock(&writers);
    dm_mapped_file *other = atomic_load(&first_file);
    if (other == file) atomic_store(&first_file, file->next);
    while (other != NULL && other->next != file) other = other->next;
    if (other != NULL) other->next = file->next;
    pthread_mutex_unlock(&writers);
}

static void nap(int milliseconds) {
    struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    while (nanosleep(&left, &left) != 0) {
    }
}

static void write_whole(int fd, const char *from, size_t bytes) {
    while (bytes > 0) {
        ssize_t written = write(fd, from, bytes);
        if (written <= 0) return;
        from += written;
        bytes -= (size_t)written;
    }
}

/* Hydra takes a failed process for a killed one, unless it is told the code that mpirun is to end with. */
static _Noreturn void end_process(const text *line, const char *first) {
    nap(ending.delay_ms);
    write_whole(STDERR_FILENO, first, (size_t)(line->at - first));
    nap(FORWARD_MS);
    if (ending.abort_fd >= 0) {
        char command[64];
        text to = {command, command + sizeof command};
        put_string(&to, "cmd=abort exitcode=");
        put_number(&to, (uint64_t)ending.exit_code);
        put_string(&to, "\n");
        write_whole(ending.abort_fd, command, (size_t)(to.at - command));
        nap(1000);
    }
    _exit(ending.exit_code);
}

/* Only one thread gets out of here: it ends the process. */
static text begin_line(char *line, size_t bytes) {
    while (atomic_flag_test_and_set(&ending.taken)) nap(1000);
    text to = {line, line + bytes};
    put_string(&to, ending.before);
    return to;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    (void)context;
    char place[4608], line[6144];
    int sent = info->si_code <= 0; /* by kill, not by a read */
    if (sent || !dm_describe_address(place, sizeof place, info->si_addr)) {
        sigaction(number, &ending.previous, NULL); /* not ours: it happens again, to whoever was in charge before */
        if (sent) raise(number);
        return;
    }
    text to = begin_line(line, sizeof line);
    put_string(&to, place);
    put_string(&to, info->si_code == BUS_ADRERR
                        ? " can no longer be read: the file became shorter or its disk failed while it was mapped; "
                          "bring the whole file back and start again\n"
                        : " can no longer be read: this host's memory is damaged there; check it (dmesg, a memory "
                          "test) and start again\n");
    end_process(&to, line);
}

void dm_end_without_memory(size_t bytes) {
    char line[1024];
    text to = begin_line(line, sizeof line);
    put_string(&to, "out of memory: a kernel could not get ");
    put_number(&to, bytes);
    put_string(&to, " bytes of working space; lower --prefill-chunk or --ctx, free memory, or start on more hosts\n");
    end_process(&to, line);
}

static int linger_ms;

static void on_crash(int number, siginfo_t *info, void *context) {
    (void)context;
    if (info->si_code <= 0) { /* sent by kill: there is nothing that would happen again */
        raise(number);
        return;
    }
    nap(linger_ms);
}

int dm_linger_after_crash(int milliseconds) {
    struct sigaction action = {.sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_RESETHAND}, previous;
    if (sigaction(SIGSEGV, NULL, &previous) != 0) return 0;
    int free = (previous.sa_flags & SA_SIGINFO) == 0 && previous.sa_handler == SIG_DFL;
    linger_ms = milliseconds;
    return !free || sigaction(SIGSEGV, &action, NULL) == 0;
}

int dm_catch_bus_errors(const char *before, int delay_ms, int exit_code, int abort_fd) {
    text to = {ending.before, ending.before + sizeof ending.before};
    put_string(&to, before);
    ending.delay_ms = delay_ms;
    ending.exit_code = exit_code;
    ending.abort_fd = abort_fd;
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO}, previous;
    if (sigaction(SIGBUS, &action, &previous) != 0) return 0;
    if (previous.sa_sigaction != on_bus_error) ending.previous = previous;
    return 1;
}
