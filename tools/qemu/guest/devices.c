// The guest side of the device tests, and the only process of a small Linux guest. It finds every served device on the PCI bus, drives it through
// vfio-pci as a driver does, and prints the results on the console:
//   GUEST <device> <check> ok|FAILED ...   one line a check      GUEST end   the last line
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *name;
static int container = -1, device = -1;

static void check(const char *what, int ok, unsigned long long value) {
    printf("GUEST %s %s %s 0x%llx\n", name, what, ok ? "ok" : "FAILED", value);
    fflush(stdout);
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) printf("GUEST - %s: %s\n", path, strerror(errno));
    if (fd >= 0) close(fd);
}

static void load(const char *module, const char *parameters) {
    char path[100];
    snprintf(path, sizeof path, "/m/%s.ko", module);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, parameters, 0)) printf("GUEST - module %s: %s\n", module, strerror(errno));
    if (fd >= 0) close(fd);
}

static uint64_t region(int index) {
    struct vfio_region_info info = { .argsz = sizeof info, .index = index };
    return ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) ? 0 : info.offset;
}

static uint64_t rd(int index, uint64_t at, int n) {
    uint64_t value = 0;
    if (pread(device, &value, n, region(index) + at) != n) value = ~0ull;
    return value;
}

static void wr(int index, uint64_t at, uint64_t value, int n) {
    if (pwrite(device, &value, n, region(index) + at) != n) printf("GUEST %s write FAILED %d+%llx: %s\n", name, index, (unsigned long long)at, strerror(errno));
}

static int irq(int index, int vector) {
    struct { struct vfio_irq_set set; int fd; } r = {
        { .argsz = sizeof r.set + 4, .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, .index = index, .start = vector, .count = 1 },
        eventfd(0, EFD_NONBLOCK) };
    if (ioctl(device, VFIO_DEVICE_SET_IRQS, &r)) printf("GUEST %s SET_IRQS %d: %s\n", name, index, strerror(errno));
    return r.fd;
}

static void irqs_off(int index) {
    struct vfio_irq_set set = { .argsz = sizeof set, .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, .index = index };
    ioctl(device, VFIO_DEVICE_SET_IRQS, &set);
}

static void unmask(void) {
    struct vfio_irq_set set = { .argsz = sizeof set, .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, .count = 1 };
    ioctl(device, VFIO_DEVICE_SET_IRQS, &set);
}

static int arrives(int fd, int ms) {
    struct pollfd p = { fd, POLLIN, 0 };
    uint64_t count = 0;
    return poll(&p, 1, ms) == 1 && read(fd, &count, 8) == 8;
}

// Allocates a page of memory and maps it for the device, at the address *iova.
static uint8_t *page(uint64_t *iova) {
    static uint64_t next = 0x2000000; // Below 256 MiB, the limit of edu's DMA addresses.
    uint8_t *at = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    memset(at, 1, 4096);
    *iova = next;
    struct vfio_iommu_type1_dma_map map = { .argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, .vaddr = (uintptr_t)at, .iova = next, .size = 4096 };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map)) printf("GUEST %s map FAILED: %s\n", name, strerror(errno));
    next += 0x10000;
    return at;
}

static int until(int bar, uint64_t at, uint64_t mask, uint64_t wanted, int n) {
    for (int i = 0; i < 5000; i++) {
        if ((rd(bar, at, n) & mask) == wanted) return 1;
        usleep(1000);
    }
    return 0;
}

static void gpio(void) {
    check("levels", rd(2, 1, 1) == 0xff, rd(2, 1, 1));
    wr(2, 0, 5, 1);
    check("counts", rd(2, 1, 1) == 0xfa, rd(2, 1, 1));
    wr(2, 4, 0x80, 1);
    check("upper-pins", rd(2, 5, 1) == 0x7f, rd(2, 5, 1));
}

static void edu(void) {
    check("id", rd(0, 0, 4) == 0x010000ed, rd(0, 0, 4));
    wr(0, 4, 0x12345678, 4);
    check("inverts", rd(0, 4, 4) == (uint32_t)~0x12345678u, rd(0, 4, 4));
    wr(0, 8, 10, 4);
    check("factorial", until(0, 0x20, 1, 0, 4) && rd(0, 8, 4) == 3628800, rd(0, 8, 4));
    int fd = irq(VFIO_PCI_INTX_IRQ_INDEX, 0);
    wr(0, 0x60, 0x10, 4);
    check("intx", arrives(fd, 5000), rd(0, 0x24, 4));
    wr(0, 0x64, 0x10, 4);
    unmask();
    check("intx-acknowledged", !arrives(fd, 200), rd(0, 0x24, 4));
    wr(0, 0x60, 0x20, 4);
    check("intx-again", arrives(fd, 5000), rd(0, 0x24, 4));
    wr(0, 0x64, 0x20, 4);
    irqs_off(VFIO_PCI_INTX_IRQ_INDEX);
    fd = irq(VFIO_PCI_MSI_IRQ_INDEX, 0);
    uint64_t from, to;
    uint8_t *source = page(&from), *destination = page(&to);
    for (int i = 0; i < 4096; i++) source[i] = i * 7;
    uint64_t starts[2][4] = { { from, 0x40000, 4096, 5 }, { 0x40000, to, 4096, 7 } };
    for (int i = 0; i < 2; i++) {
        for (int r = 0; r < 4; r++) wr(0, 0x80 + 8 * r, starts[i][r], 8);
        check(i ? "msi-after-dma-write" : "msi-after-dma-read", arrives(fd, 5000), rd(0, 0x24, 4));
        wr(0, 0x64, 0x100, 4);
    }
    check("dma", memcmp(source, destination, 4096) == 0, destination[4095]);
    irqs_off(VFIO_PCI_MSI_IRQ_INDEX);
}

static void dma_test(void) {
    check("id", rd(0, 0, 4) == 0x54414d44, rd(0, 0, 4));
    wr(2, 0x1000, 0xabcd1234, 4);
    check("memory-bar", rd(2, 0x1000, 4) == 0xabcd1234, rd(2, 0x1000, 4));
    int fd = irq(VFIO_PCI_MSIX_IRQ_INDEX, 0);
    uint64_t at;
    uint8_t *memory = page(&at);
    wr(0, 0x10, at, 8);
    wr(0, 0x18, 4096, 8);
    wr(0, 0x20, 400000, 8);
    wr(0, 0x2c, 10, 4);
    wr(0, 4, 1, 4);
    check("msix", arrives(fd, 10000), rd(0, 0x30, 8));
    check("msix-again", arrives(fd, 10000), rd(0, 0x38, 8));
    wr(0, 4, 0, 4);
    usleep(100000);
    uint64_t last = *(volatile uint64_t *)memory, next = rd(0, 0x30, 8);
    check("dma", last + 1 == next && next >= 20, last);
    check("no-error", rd(0, 0xc, 4) == 0, rd(0, 0xc, 4));
    irqs_off(VFIO_PCI_MSIX_IRQ_INDEX);
}

static void sample(void) {
    for (int i = 0; i < 0x3000; i += 0x800) wr(1, i, i * 3, 4);
    int ok = 1;
    for (int i = 0; i < 0x3000; i += 0x800) ok &= rd(1, i, 4) == (uint64_t)(i * 3);
    check("bar1", ok, rd(1, 0x2800, 4));
    int fd = irq(VFIO_PCI_INTX_IRQ_INDEX, 0);
    uint64_t at;
    volatile uint8_t *first = page(&at), *second = page(&at);
    uint64_t now = time(0);
    wr(0, 0, now + 1, 4);
    check("timer-intx", arrives(fd, 10000), now);
    int64_t since = (int32_t)rd(0, 0, 4);
    check("timer-since", since >= 0 && since < 60, since);
    unmask();
    check("intx-acknowledged", !arrives(fd, 200), 0);
    for (int i = 0; i < 5000 && first[4095] != 'D'; i++) usleep(1000);
    check("dma-by-descriptor", second[0] == 'A' && second[4095] == 'D', second[4095]);
    check("dma-by-messages", first[0] == 'A' && first[4095] == 'D', first[4095]);
    irqs_off(VFIO_PCI_INTX_IRQ_INDEX);
}

static const struct { const char *vendor, *device, *name; void (*run)(void); } known[] = {
    { "0x494f", "0x0dc8", "gpio", gpio }, { "0x1234", "0x11e8", "edu", edu }, { "0x1b36", "0xd3a7", "dma-test", dma_test }, { "0xdead", "0xbeef", "sample", sample } };

static void attribute(const char *bdf, const char *what, char *into, int size) {
    char path[200];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", bdf, what);
    int fd = open(path, O_RDONLY), n = fd < 0 ? 0 : read(fd, into, size - 1);
    into[n > 0 ? n : 0] = 0;
    into[strcspn(into, "\n")] = 0;
    if (fd >= 0) close(fd);
}

static int attach(const char *bdf) {
    char path[200], group[200] = "";
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver_override", bdf);
    put(path, "vfio-pci");
    put("/sys/bus/pci/drivers_probe", bdf);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", bdf);
    int n = readlink(path, group, sizeof group - 1);
    if (n < 0) return -1;
    group[n] = 0;
    snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(group, '/') + 1);
    container = open("/dev/vfio/vfio", O_RDWR);
    int fd = open(path, O_RDWR);
    if (fd < 0 || ioctl(fd, VFIO_GROUP_SET_CONTAINER, &container) || ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU)) return -1;
    device = ioctl(fd, VFIO_GROUP_GET_DEVICE_FD, bdf);
    return device < 0 ? -1 : fd;
}

static void each(const char *bdf) {
    char vendor[20], id[20];
    attribute(bdf, "vendor", vendor, sizeof vendor);
    attribute(bdf, "device", id, sizeof id);
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(vendor, known[i].vendor) || strcmp(id, known[i].device)) continue;
        name = known[i].name;
        check("enumerated", 1, strtoul(id, 0, 0));
        int group = attach(bdf);
        if (group < 0) { check("attach", 0, errno); return; }
        wr(VFIO_PCI_CONFIG_REGION_INDEX, 4, 7, 2);
        known[i].run();
        close(device); close(group); close(container);
    }
}

int main(void) {
    mount("proc", "/proc", "proc", 0, 0);
    mount("sys", "/sys", "sysfs", 0, 0);
    mount("dev", "/dev", "devtmpfs", 0, 0);
    int fd = open("/dev/ttyS0", O_RDWR);
    dup2(fd, 1); dup2(fd, 2);
    load("irqbypass", ""); load("iommufd", ""); load("vfio", ""); load("vfio_iommu_type1", "");
    load("vfio-pci-core", ""); load("vfio-pci", "");
    struct dirent *entry;
    DIR *all = opendir("/sys/bus/pci/devices");
    while (all && (entry = readdir(all))) if (entry->d_name[0] != '.') each(entry->d_name);
    printf("GUEST end\n");
    fflush(stdout);
    fsync(1);
    sleep(1);
    reboot(RB_AUTOBOOT);
    return 0;
}
