// SPDX-License-Identifier: GPL-2.0-only
// A driver of the project's dma-test device, for nested guests. It checks registers, memory that may be mapped, interrupts by pin or MSI-X with a
// vector that is masked for a while, and the device's writes into memory, and prints the results:
//   DMA <check> ok|FAILED <value>
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>

#define BLOCKS 8
#define BLOCK 4096

static bool msix = true;
module_param(msix, bool, 0444);
MODULE_PARM_DESC(msix, "message-signalled interrupts instead of the pin");

struct dmatest {
	void __iomem *bar, *memory;
	struct completion done;
	atomic_t count;
};

static void check(const char *what, bool ok, u64 value)
{
	pr_notice("DMA %s %s 0x%llx\n", what, ok ? "ok" : "FAILED", value);
}

static irqreturn_t handle(int irq, void *data)
{
	struct dmatest *d = data;

	if (!msix) {
		if (!(readl(d->bar + 0x08) & 4))
			return IRQ_NONE;
		writel(1, d->bar + 0x54);
	}
	atomic_inc(&d->count);
	complete(&d->done);
	return IRQ_HANDLED;
}

/* Lets the device write some blocks, each with an interrupt. */
static void run(struct dmatest *d, dma_addr_t at, u32 sequence)
{
	writel(lower_32_bits(at), d->bar + 0x10);
	writel(upper_32_bits(at), d->bar + 0x14);
	writel(BLOCKS * BLOCK, d->bar + 0x18);
	writel(0, d->bar + 0x1c);
	writel(64 * BLOCK, d->bar + 0x20);
	writel(0, d->bar + 0x24);
	writel(BLOCK, d->bar + 0x28);
	writel(1, d->bar + 0x2c);
	writel(sequence, d->bar + 0x30);
	writel(0, d->bar + 0x34);
	writel(1, d->bar + 0x04);
}

static int dmatest_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct dmatest *d = devm_kzalloc(&pci->dev, sizeof(*d), GFP_KERNEL);
	dma_addr_t at;
	u64 *memory;
	int error, i, same, irq;

	if (!d)
		return -ENOMEM;
	init_completion(&d->done);
	error = pcim_enable_device(pci);
	if (!error)
		error = pcim_iomap_regions(pci, 1 | 4, "dmatest");
	if (error)
		return error;
	d->bar = pcim_iomap_table(pci)[0];
	d->memory = pcim_iomap_table(pci)[2];
	memory = dmam_alloc_coherent(&pci->dev, BLOCKS * BLOCK, &at, GFP_KERNEL);
	if (!memory)
		return -ENOMEM;
	pci_set_master(pci);
	error = pci_alloc_irq_vectors(pci, 1, 1, msix ? PCI_IRQ_MSIX : PCI_IRQ_INTX);
	if (error < 0)
		return error;
	irq = pci_irq_vector(pci, 0);
	error = devm_request_irq(&pci->dev, irq, handle, msix ? 0 : IRQF_SHARED, "dmatest", d);
	if (error)
		return error;

	check("id", readl(d->bar) == 0x54414d44, readl(d->bar));
	for (i = 0; i < 0x4000; i += 4)
		writel(i ^ 0x5a5a0000, d->memory + i);
	for (i = 0, same = 0; i < 0x4000; i += 4)
		same += readl(d->memory + i) == (i ^ 0x5a5a0000);
	check("memory", same == 0x1000, same);

	run(d, at, 1000);
	for (i = 0; i < 2 * BLOCKS; i++)
		if (!wait_for_completion_timeout(&d->done, 20 * HZ))
			break;
	check("interrupts", i == 2 * BLOCKS, i);
	disable_irq(irq);
	/* An interrupt that comes while the vector is masked is kept, once. */
	reinit_completion(&d->done);
	i = readl(d->bar + 0x38);
	while (readl(d->bar + 0x38) < i + 2)
		cpu_relax();
	check("masked", !try_wait_for_completion(&d->done), atomic_read(&d->count));
	writel(0, d->bar + 0x04);
	enable_irq(irq);
	check("unmasked", wait_for_completion_timeout(&d->done, 20 * HZ), atomic_read(&d->count));
	for (i = 0, same = 0; i < BLOCKS; i++)
		same += memory[i * BLOCK / 8] >= 1000 && memory[i * BLOCK / 8] % BLOCKS == i;
	check("dma", same == BLOCKS, same);
	pci_set_drvdata(pci, d);
	return 0;
}

static const struct pci_device_id ids[] = { { PCI_DEVICE(0x1b36, 0xd3a7) }, {} };
static struct pci_driver dmatest_driver = { .name = "vmm_dmatest", .id_table = ids, .probe = dmatest_probe };
module_pci_driver(dmatest_driver);
MODULE_DEVICE_TABLE(pci, ids);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Self-checking driver of the project's dma-test device");
