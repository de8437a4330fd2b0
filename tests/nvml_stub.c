/* A libnvidia-ml.so.1 whose cards stand in a text file ($NVML_STUB), read again when it changes.
   nvml_stub.py writes that file. Signatures and codes are those of NVIDIA's public nvml.h. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { OK, UNINITIALIZED, INVALID, NOT_SUPPORTED, NOT_FOUND = 6, TOO_SMALL = 7 };
enum { CARDS = 16, PARTS = 8, PROCESSES = 32, FAILURES = 32, TEXT = 96 };

typedef unsigned long long u64;
typedef struct { unsigned pid; u64 used; unsigned gi, ci; } Process;
typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Use;

typedef struct Device {
    char name[TEXT], uuid[TEXT];
    Memory memory;
    int major, minor;
    long temperature, power, limit, use, cores, clock;      /* negative: not supported */
    u64 reasons;
    int mig, parts, index, part;                            /* part -1: a whole card */
    Process compute[PROCESSES], graphics[PROCESSES];
    unsigned computing, drawing;
} Device;

typedef struct { char function[TEXT]; int device, code; long after; } Failure;

static Device devices[CARDS][1 + PARTS];                    /* the card, then its instances */
static Failure failures[FAILURES];
static int cards, failing, opened, cuda;
static char driver[TEXT];
static struct stat seen;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void copy(char *to, const char *from) { snprintf(to, TEXT, "%s", from); }

static Device *fresh(int card, int part) {
    Device *d = &devices[card][part + 1];
    memset(d, 0, sizeof *d);
    d->index = card;
    d->part = part;
    return d;
}

static void process(Device *d, const char *value) {
    unsigned pid;
    long long used;
    char kind;
    if (sscanf(value, "%u %lld %c", &pid, &used, &kind) != 3) return;
    Process *list = kind == 'G' ? d->graphics : d->compute;
    unsigned *count = kind == 'G' ? &d->drawing : &d->computing;
    if (*count < PROCESSES) list[(*count)++] = (Process){pid, (u64)used, 0, 0};
}

static void fact(Device *d, const char *key, const char *value) {
    if (!strcmp(key, "name")) copy(d->name, value);
    else if (!strcmp(key, "uuid")) copy(d->uuid, value);
    else if (!strcmp(key, "total")) d->memory.total = strtoull(value, 0, 10);
    else if (!strcmp(key, "free")) d->memory.free = strtoull(value, 0, 10);
    else if (!strcmp(key, "capability")) sscanf(value, "%d.%d", &d->major, &d->minor);
    else if (!strcmp(key, "temperature")) d->temperature = atol(value);
    else if (!strcmp(key, "power")) d->power = atol(value);
    else if (!strcmp(key, "limit")) d->limit = atol(value);
    else if (!strcmp(key, "use")) d->use = atol(value);
    else if (!strcmp(key, "cores")) d->cores = atol(value);
    else if (!strcmp(key, "clock")) d->clock = atol(value);
    else if (!strcmp(key, "reasons")) d->reasons = strtoull(value, 0, 0);
    else if (!strcmp(key, "mig")) d->mig = atoi(value);
    else if (!strcmp(key, "process")) process(d, value);
    d->memory.used = d->memory.total - d->memory.free;
}

static void general(const char *key, const char *value) {
    Failure *f = &failures[failing];
    if (!strcmp(key, "driver")) copy(driver, value);
    else if (!strcmp(key, "cuda")) cuda = atoi(value);
    else if (!strcmp(key, "fail") && failing < FAILURES
             && sscanf(value, "%95s %d %d %ld", f->function, &f->device, &f->code, &f->after) == 4)
        failing++;
}

static void load(void) {
    const char *path = getenv("NVML_STUB");
    struct stat now;
    if (!path || stat(path, &now)) return;
    if (now.st_ino == seen.st_ino && now.st_mtim.tv_sec == seen.st_mtim.tv_sec
        && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec && now.st_size == seen.st_size) return;
    FILE *file = fopen(path, "r");
    if (!file) return;
    seen = now;
    cards = failing = cuda = 0;
    driver[0] = 0;
    Device *d = 0;
    char line[512];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *equals = strchr(line, '=');
        if (!strcmp(line, "[card]") && cards < CARDS) d = fresh(cards++, -1);
        else if (!strcmp(line, "[mig]") && cards && devices[cards - 1][0].parts < PARTS)
            d = fresh(cards - 1, devices[cards - 1][0].parts++);
        else if (equals) {
            *equals = 0;
            if (d) fact(d, line, equals + 1); else general(line, equals + 1);
        }
    }
    fclose(file);
}

/* What the call has to answer before it looks at the card: an error by order, or OK. */
static int refused(const char *function, int device) {
    for (int i = 0; i < failing; i++) {
        Failure *f = &failures[i];
        if (!strcmp(f->function, function) && (f->device < 0 || f->device == device)
            && --f->after < 0) return f->code;
    }
    return opened > 0 || !strncmp(function, "nvmlInit", 8) ? OK : UNINITIALIZED;
}

static Device *at(void *handle) {
    long number = (long)handle - 1, card = number / 100, part = number % 100 - 1;
    if (number < 0 || card >= cards || part >= devices[card][0].parts) return 0;
    return &devices[card][part + 1];
}

static void *handle_of(const Device *d) { return (void *)(long)(1 + d->index * 100 + d->part + 1); }

/* A function of NVML: `body` sees `d`, the device, or NULL where it takes none; it sets `code`. */
#define NVML(name, parameters, device, body)                                                    \
    int name parameters {                                                                       \
        pthread_mutex_lock(&lock);                                                              \
        load();                                                                                 \
        Device *d = device;                                                                     \
        int code = refused(#name, d ? d->index : -1);                                           \
        if (code == OK) { body; }                                                               \
        pthread_mutex_unlock(&lock);                                                            \
        return code;                                                                            \
    }
#define ASKED(name, parameters, body)                                                           \
    NVML(name, parameters, at(handle), if (!d) code = NOT_FOUND; else { body; })
#define OF_DEVICE(name, type, body) ASKED(name, (void *handle, type *out), body)
#define NUMBER(name, field)                                                                     \
    OF_DEVICE(name, unsigned, if (d->field < 0) code = NOT_SUPPORTED; else *out = d->field)

NVML(nvmlInitWithFlags, (unsigned flags), 0, (void)flags; opened++)
NVML(nvmlInit, (void), 0, opened++)
NVML(nvmlInit_v2, (void), 0, opened++)
NVML(nvmlShutdown, (void), 0, opened--)
NVML(nvmlSystemGetDriverVersion, (char *out, unsigned size), 0, snprintf(out, size, "%s", driver))
NVML(nvmlSystemGetCudaDriverVersion, (int *out), 0, *out = cuda)
NVML(nvmlSystemGetCudaDriverVersion_v2, (int *out), 0, *out = cuda)
NVML(nvmlDeviceGetCount_v2, (unsigned *out), 0, *out = cards)

NVML(nvmlDeviceGetHandleByIndex_v2, (unsigned index, void **out),
     index < (unsigned)cards ? &devices[index][0] : 0,
     if (d) *out = handle_of(d); else code = INVALID)

static Device *called(const char *uuid) {
    for (int card = 0; card < cards; card++)
        for (int part = 0; part <= devices[card][0].parts; part++)
            if (!strcmp(devices[card][part].uuid, uuid)) return &devices[card][part];
    return 0;
}
NVML(nvmlDeviceGetHandleByUUID, (const char *uuid, void **out), called(uuid),
     if (d) *out = handle_of(d); else code = NOT_FOUND)

ASKED(nvmlDeviceGetName, (void *handle, char *out, unsigned size),
     snprintf(out, size, "%s", d->name))
ASKED(nvmlDeviceGetUUID, (void *handle, char *out, unsigned size),
     snprintf(out, size, "%s", d->uuid))
ASKED(nvmlDeviceGetCudaComputeCapability, (void *handle, int *major, int *minor),
     *major = d->major; *minor = d->minor)
OF_DEVICE(nvmlDeviceGetMemoryInfo, Memory, *out = d->memory)
NUMBER(nvmlDeviceGetPowerUsage, power)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, limit)
NUMBER(nvmlDeviceGetNumGpuCores, cores)
OF_DEVICE(nvmlDeviceGetUtilizationRates, Use,
          if (d->use < 0) code = NOT_SUPPORTED; else *out = ((Use){d->use, 0}))
ASKED(nvmlDeviceGetTemperature, (void *handle, unsigned sensor, unsigned *out),
     (void)sensor; if (d->temperature < 0) code = NOT_SUPPORTED; else *out = d->temperature)
ASKED(nvmlDeviceGetMaxClockInfo, (void *handle, unsigned kind, unsigned *out),
     (void)kind; if (d->clock < 0) code = NOT_SUPPORTED; else *out = d->clock)
OF_DEVICE(nvmlDeviceGetCurrentClocksEventReasons, u64, *out = d->reasons)
OF_DEVICE(nvmlDeviceGetCurrentClocksThrottleReasons, u64, *out = d->reasons)

static int listed(const Process *from, unsigned have, unsigned *count, Process *out) {
    unsigned room = *count;
    *count = have;
    if (have > room) return TOO_SMALL;
    memcpy(out, from, have * sizeof *out);
    return OK;
}
NVML(nvmlDeviceGetComputeRunningProcesses_v3, (void *handle, unsigned *count, Process *out),
     at(handle), code = listed(d->compute, d->computing, count, out))
NVML(nvmlDeviceGetGraphicsRunningProcesses_v3, (void *handle, unsigned *count, Process *out),
     at(handle), code = listed(d->graphics, d->drawing, count, out))

ASKED(nvmlDeviceGetMigMode, (void *handle, unsigned *current, unsigned *pending),
     if (d->mig < 0) code = NOT_SUPPORTED; else *current = *pending = d->mig)
OF_DEVICE(nvmlDeviceGetMaxMigDeviceCount, unsigned, *out = d->mig ? PARTS : 0)
ASKED(nvmlDeviceGetMigDeviceHandleByIndex, (void *handle, unsigned index, void **out),
     if (index < (unsigned)d->parts) *out = handle_of(&devices[d->index][index + 1]);
     else code = NOT_FOUND)
OF_DEVICE(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, void *,
          *out = handle_of(&devices[d->index][0]))

const char *nvmlErrorString(int code) { (void)code; return "stub"; }
