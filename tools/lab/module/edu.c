// SPDX-License-Identifier: GPL-2.0-only
// A driver of QEMU's edu device, for nested guests. It checks registers, the interrupt and DMA in both directions, and prints the results:
//   EDU <check> ok|FAILED <value>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>

static bool msi;
module_param(msi, bool, 0444);
MODULE_PARM_DESC(msi, "message-signalled interrupts instead of the pin");

struct edu {
	void __iomem *bar;
	struct completion done;
	u32 status;
};

static void check(const char *what, bool ok, u64 value)
{
	pr_notice("EDU %s %s 0x%llx\n", what, ok ? "ok" : "FAILED", value);
}

static irqreturn_t handle(int irq, void *data)
{
	struct edu *edu = data;
	u32 status = readl(edu->bar + 0x24);

	if (!status)
		return IRQ_NONE;
	writel(status, edu->bar + 0x64);
	edu->status = status;
	complete(&edu->done);
	return IRQ_HANDLED;
}

static bool arrives(struct edu *edu, u32 status)
{
	return wait_for_completion_timeout(&edu->done, 20 * HZ) && edu->status == status;
}

static void transfer(struct edu *edu, u64 from, u64 to, u32 bytes, u32 command)
{
	writel(lower_32_bits(from), edu->bar + 0x80);
	writel(lower_32_bits(to), edu->bar + 0x88);
	writel(bytes, edu->bar + 0x90);
	writel(command, edu->bar + 0x98);
}

static int edu_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct edu *edu = devm_kzalloc(&pci->dev, sizeof(*edu), GFP_KERNEL);
	dma_addr_t at;
	u8 *memory;
	int error, i, same = 0;

	if (!edu)
		return -ENOMEM;
	init_completion(&edu->done);
	error = pcim_enable_device(pci);
	if (!error)
		error = pcim_iomap_regions(pci, 1, "edu");
	if (!error)
		error = dma_set_mask_and_coherent(&pci->dev, DMA_BIT_MASK(28));
	if (error)
		return error;
	edu->bar = pcim_iomap_table(pci)[0];
	pci_set_master(pci);
	error = pci_alloc_irq_vectors(pci, 1, 1, msi ? PCI_IRQ_MSI : PCI_IRQ_INTX);
	if (error < 0)
		return error;
	error = devm_request_irq(&pci->dev, pci_irq_vector(pci, 0), handle, msi ? 0 : IRQF_SHARED, "edu", edu);
	memory = dmam_alloc_coherent(&pci->dev, 8192, &at, GFP_KERNEL);
	if (error || !memory)
		return error ? error : -ENOMEM;

	check("id", readl(edu->bar) == 0x010000ed, readl(edu->bar));
	writel(0x12345678, edu->bar + 4);
	check("inverts", readl(edu->bar + 4) == ~0x12345678u, readl(edu->bar + 4));
	for (i = 1; i <= 3; i++) {
		writel(i, edu->bar + 0x60);
		check(msi ? "msi" : "intx", arrives(edu, i), edu->status);
	}
	for (i = 0; i < 4096; i++)
		memory[i] = i * 7 + 1;
	transfer(edu, at, 0x40000, 2048, 5);
	check("dma-from-memory", arrives(edu, 0x100), edu->status);
	transfer(edu, 0x40000, at + 4096, 2048, 7);
	check("dma-to-memory", arrives(edu, 0x100), edu->status);
	for (i = 0; i < 2048; i++)
		same += memory[i] == memory[4096 + i];
	check("dma-content", same == 2048, same);
	pci_set_drvdata(pci, edu);
	return 0;
}

static const struct pci_device_id ids[] = { { PCI_DEVICE(0x1234, 0x11e8) }, {} };
static struct pci_driver edu_driver = { .name = "vmm_edu", .id_table = ids, .probe = edu_probe };
module_pci_driver(edu_driver);
MODULE_DEVICE_TABLE(pci, ids);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Self-checking driver of QEMU's edu device");
