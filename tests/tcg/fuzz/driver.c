/* SPDX-License-Identifier: Apache-2.0
 *
 * main() for a fuzz target where libFuzzer is missing: runs the files of a folder, then `runs` inputs made of them by
 * small changes, always the same for the same seed. It looks at no coverage.
 *
 *     target FOLDER|FILE [runs [seed]]
 *
 * An input that ends the process is left behind as crash-input in the working directory.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

#ifndef LONGEST
#define LONGEST 512
#endif
enum { MOST = 1 << 16 };
struct seed { uint8_t *data; size_t size; };
static struct seed *seeds;
static size_t count;

/* The running input, in a file that outlives the process. */
static struct { uint32_t size; uint8_t data[LONGEST]; } *current;

static void run(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1); /* a byte beyond the input is a finding too */
    if (!exact)
        exit(2);
    memcpy(exact, data, size);
    current->size = (uint32_t)size;
    memcpy(current->data, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

static void add(const char *path)
{
    uint8_t data[LONGEST];
    FILE *f = fopen(path, "rb");
    if (!f || count == MOST)
        exit(2);
    size_t size = fread(data, 1, sizeof data, f);
    fclose(f);
    seeds = realloc(seeds, (count + 1) * sizeof *seeds);
    seeds[count] = (struct seed){malloc(size ? size : 1), size};
    memcpy(seeds[count++].data, data, size);
}

static int visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static void add_all(const char *path)
{
    struct dirent **names;
    struct stat st;
    if (stat(path, &st)) {
        perror(path);
        exit(2);
    }
    if (!S_ISDIR(st.st_mode)) {
        add(path);
        return;
    }
    int n = scandir(path, &names, visible, alphasort);
    for (int i = 0; i < n; i++) {
        char file[4096];
        snprintf(file, sizeof file, "%s/%s", path, names[i]->d_name);
        add(file);
        free(names[i]);
    }
    free(names);
}

static uint64_t state;
static uint64_t next(void)
{
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static size_t change(uint8_t *data, size_t size)
{
    size_t at = size ? next() % size : 0;
    const struct seed *other = &seeds[next() % count];
    switch (next() % 5) {
    case 0: /* a bit */
        if (size)
            data[at] ^= 1 << next() % 8;
        return size;
    case 1: /* a byte */
        if (size)
            data[at] = (uint8_t)next();
        return size;
    case 2: /* one more byte */
        if (size == LONGEST)
            return size;
        memmove(data + at + 1, data + at, size - at);
        data[at] = (uint8_t)next();
        return size + 1;
    case 3: /* one less */
        if (!size)
            return size;
        memmove(data + at, data + at + 1, size - at - 1);
        return size - 1;
    default: { /* the end of another */
        size_t from = other->size ? next() % other->size : 0, n = other->size - from;
        n = n < LONGEST - at ? n : LONGEST - at;
        memcpy(data + at, other->data + from, n);
        return at + n;
    }
    }
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    int fd = open("crash-input", O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || ftruncate(fd, sizeof *current))
        return 2;
    current = mmap(NULL, sizeof *current, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (current == MAP_FAILED || LLVMFuzzerInitialize(&argc, &argv))
        return 2;
    add_all(argv[1]);
    unsigned long runs = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
    state = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    for (size_t i = 0; i < count; i++)
        run(seeds[i].data, seeds[i].size);
    for (unsigned long i = 0; i < runs && count; i++) {
        uint8_t data[LONGEST];
        const struct seed *from = &seeds[next() % count];
        size_t size = from->size;
        memcpy(data, from->data, size);
        for (unsigned n = 1 + next() % 4; n; n--)
            size = change(data, size);
        run(data, size);
    }
    printf("%zu inputs and %lu changed ones\n", count, runs);
    unlink("crash-input");
    return 0;
}
