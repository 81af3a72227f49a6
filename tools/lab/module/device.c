// SPDX-License-Identifier: GPL-2.0-only
/* The device: config space, BAR 0, knobs, and the records that carry its state. */
#include <linux/atomic.h>
#include <linux/device.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/pci_regs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include "vmm_lab.h"

#define MAX_STATE_BYTES (256 << 20)
#define LOG_BYTES 4000

static atomic_t sequence = ATOMIC_INIT(0);

void lab_note(struct lab_device *lab, unsigned int state)
{
	int n = snprintf(NULL, 0, "%d %u\n", 1000000, state);

	if (lab->log_length + n + 1 < LOG_BYTES)
		lab->log_length += scnprintf(lab->log + lab->log_length, LOG_BYTES - lab->log_length, "%d %u\n", atomic_inc_return(&sequence), state);
}

/* ---- records ---- */

static void put_record(struct lab_out *out, u32 type, u64 length)
{
	struct lab_record record = { cpu_to_le32(LAB_RECORD_MAGIC), cpu_to_le32(type), cpu_to_le64(length) };

	memcpy(out->head + out->head_length, &record, sizeof(record));
	out->head_length += sizeof(record);
}

int lab_out_start(struct lab_device *lab, bool precopy)
{
	struct lab_out *out = &lab->out;

	lab_out_end(lab);
	lab->reinit_left = lab->reinit;
	out->head_capacity = (lab->precopy_bytes + sizeof(struct lab_record)) * (1 + lab->reinit) + sizeof(struct lab_record);
	out->head = vzalloc(out->head_capacity);
	if (!out->head)
		return -ENOMEM;
	if (precopy)
		lab_out_first(lab);
	return 0;
}

void lab_out_first(struct lab_device *lab)
{
	struct lab_out *out = &lab->out;

	if (!lab->precopy_bytes)
		return;
	put_record(out, LAB_RECORD_FIRST, lab->precopy_bytes);
	memset(out->head + out->head_length, 0x46, lab->precopy_bytes);
	out->head_length += lab->precopy_bytes;
}

void lab_out_state(struct lab_device *lab)
{
	put_record(&lab->out, LAB_RECORD_STATE, lab->state_bytes);
	lab->out.has_state = true;
}

void lab_out_end(struct lab_device *lab)
{
	vfree(lab->out.head);
	memset(&lab->out, 0, sizeof(lab->out));
}

size_t lab_out_length(struct lab_device *lab)
{
	return lab->out.head_length + (lab->out.has_state ? lab->state_bytes : 0);
}

void lab_out_copy(struct lab_device *lab, size_t at, u8 *to, size_t length)
{
	if (at < lab->out.head_length) {
		size_t n = min(length, lab->out.head_length - at);

		memcpy(to, lab->out.head + at, n);
		at += n;
		to += n;
		length -= n;
	}
	if (length)
		memcpy(to, lab->state + (at - lab->out.head_length), length);
}

int lab_load_start(struct lab_device *lab)
{
	lab_load_end(lab);
	lab->loaded = vmalloc(lab->state_bytes + LAB_SLACK_BYTES);
	return lab->loaded ? 0 : -ENOMEM;
}

int lab_load_add(struct lab_device *lab, const u8 *from, size_t length)
{
	if (length > lab->state_bytes + LAB_SLACK_BYTES - lab->loaded_length)
		return -ENOMEM;
	memcpy(lab->loaded + lab->loaded_length, from, length);
	lab->loaded_length += length;
	return 0;
}

int lab_load_finish(struct lab_device *lab)
{
	size_t at = 0;
	bool found = false;

	while (at < lab->loaded_length) {
		struct lab_record record;
		size_t length;

		if (found || lab->loaded_length - at < sizeof(record))
			return -EINVAL;
		memcpy(&record, lab->loaded + at, sizeof(record));
		at += sizeof(record);
		length = le64_to_cpu(record.length);
		if (le32_to_cpu(record.magic) != LAB_RECORD_MAGIC || length > lab->loaded_length - at)
			return -EINVAL;
		if (le32_to_cpu(record.type) == LAB_RECORD_STATE) {
			if (length != lab->state_bytes)
				return -EINVAL;
			memcpy(lab->state, lab->loaded + at, length);
			found = true;
		} else if (le32_to_cpu(record.type) != LAB_RECORD_FIRST) {
			return -EINVAL;
		}
		at += length;
	}
	return found ? 0 : -EINVAL;
}

void lab_load_end(struct lab_device *lab)
{
	vfree(lab->loaded);
	lab->loaded = NULL;
	lab->loaded_length = 0;
}

/* ---- regions ---- */

static u64 region_bytes(struct lab_device *lab, u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return LAB_BAR_BYTES;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return LAB_CONFIG_BYTES;
	case LAB_V1_INDEX:
		return lab->is_v1 ? LAB_V1_DATA + lab->data_section_bytes : 0;
	default:
		return 0;
	}
}

static void write_config(struct lab_device *lab, u64 offset, const u8 *bytes, size_t length)
{
	while (length--) {
		u8 value = *bytes++;

		/* Only the command and the base address are writable; the address is aligned to the size of the BAR. */
		if (offset == PCI_COMMAND || offset == PCI_COMMAND + 1 || offset == PCI_BASE_ADDRESS_0 + 2 || offset == PCI_BASE_ADDRESS_0 + 3)
			lab->config[offset] = value;
		else if (offset == PCI_BASE_ADDRESS_0 + 1)
			lab->config[offset] = value & 0xf0;
		offset++;
	}
}

static int access(struct lab_device *lab, u32 index, u64 offset, u8 *bytes, size_t length, bool write)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		memcpy(write ? lab->state + offset : bytes, write ? bytes : lab->state + offset, length);
		return 0;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		if (write)
			write_config(lab, offset, bytes, length);
		else
			memcpy(bytes, lab->config + offset, length);
		return 0;
	default:
		return lab_v1_access(lab, offset, bytes, length, write);
	}
}

static ssize_t region_io(struct vfio_device *vdev, char __user *user, size_t count, loff_t *pos, bool write)
{
	struct lab_device *lab = to_lab(vdev);
	u32 index = *pos >> LAB_OFFSET_SHIFT;
	u64 offset = *pos & ((1ULL << LAB_OFFSET_SHIFT) - 1), size = region_bytes(lab, index);
	u8 bytes[512];
	int ret;

	if (offset >= size)
		return -EINVAL;
	count = min_t(u64, min_t(size_t, count, sizeof(bytes)), size - offset);
	if (write && copy_from_user(bytes, user, count))
		return -EFAULT;
	mutex_lock(&lab->lock);
	ret = access(lab, index, offset, bytes, count, write);
	mutex_unlock(&lab->lock);
	if (!ret && !write && copy_to_user(user, bytes, count))
		ret = -EFAULT;
	if (ret)
		return ret;
	*pos += count;
	return count;
}

static ssize_t lab_read(struct vfio_device *vdev, char __user *user, size_t count, loff_t *pos)
{
	return region_io(vdev, user, count, pos, false);
}

static ssize_t lab_write(struct vfio_device *vdev, const char __user *user, size_t count, loff_t *pos)
{
	return region_io(vdev, (char __user *)user, count, pos, true);
}

static long region_info(struct lab_device *lab, void __user *argument)
{
	const size_t minimum = offsetofend(struct vfio_region_info, offset);
	struct vfio_region_info_cap_type type = {
		.header = { .id = VFIO_REGION_INFO_CAP_TYPE, .version = 1 }, .type = VFIO_REGION_TYPE_MIGRATION_DEPRECATED, .subtype = VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED,
	};
	struct vfio_region_info info;

	if (copy_from_user(&info, argument, minimum))
		return -EFAULT;
	if (info.argsz < minimum || info.index > LAB_V1_INDEX || (info.index == LAB_V1_INDEX && !lab->is_v1))
		return -EINVAL;
	info.flags = 0;
	info.cap_offset = 0;
	info.size = region_bytes(lab, info.index);
	info.offset = (u64)info.index << LAB_OFFSET_SHIFT;
	if (info.size)
		info.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	if (info.index == LAB_V1_INDEX) {
		info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
		if (info.argsz >= sizeof(info) + sizeof(type)) {
			if (copy_to_user(argument + sizeof(info), &type, sizeof(type)))
				return -EFAULT;
			info.cap_offset = sizeof(info);
		} else {
			info.argsz = sizeof(info) + sizeof(type);
		}
	}
	return copy_to_user(argument, &info, sizeof(info)) ? -EFAULT : 0;
}

static long lab_ioctl(struct vfio_device *vdev, unsigned int command, unsigned long argument)
{
	struct lab_device *lab = to_lab(vdev);
	void __user *user = (void __user *)argument;

	switch (command) {
	case VFIO_DEVICE_GET_INFO: {
		struct vfio_device_info info;
		const size_t minimum = offsetofend(struct vfio_device_info, num_irqs);

		if (copy_from_user(&info, user, minimum))
			return -EFAULT;
		if (info.argsz < minimum)
			return -EINVAL;
		info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
		info.num_regions = lab->is_v1 ? LAB_V1_INDEX + 1 : VFIO_PCI_NUM_REGIONS;
		info.num_irqs = VFIO_PCI_NUM_IRQS;
		return copy_to_user(user, &info, minimum) ? -EFAULT : 0;
	}
	case VFIO_DEVICE_GET_REGION_INFO:
		return region_info(lab, user);
	case VFIO_DEVICE_GET_IRQ_INFO: {
		struct vfio_irq_info info;

		if (copy_from_user(&info, user, sizeof(info)))
			return -EFAULT;
		if (info.argsz < sizeof(info) || info.index >= VFIO_PCI_NUM_IRQS)
			return -EINVAL;
		info.flags = 0;
		info.count = 0;
		return copy_to_user(user, &info, sizeof(info)) ? -EFAULT : 0;
	}
	case VFIO_DEVICE_RESET: {
		long ret = 0;

		mutex_lock(&lab->lock);
		if (lab->refuse_reset) {
			lab->refuse_reset--;
			ret = -EIO;
		} else if (lab->is_v1) {
			lab_v1_reset(lab);
		} else {
			lab_v2_reset(lab);
		}
		mutex_unlock(&lab->lock);
		return ret;
	}
	default:
		return -ENOTTY;
	}
}

static int lab_feature(struct vfio_device *vdev, u32 flags, void __user *argument, size_t argsz)
{
	return lab_v2_feature(to_lab(vdev), flags, argsz);
}

static int lab_open(struct vfio_device *vdev)
{
	struct lab_device *lab = to_lab(vdev);
	int ret = 0;

	mutex_lock(&lab->lock);
	lab->precopy_info_v2 = false;
	if (lab->is_v1)
		ret = lab_v1_open(lab);
	mutex_unlock(&lab->lock);
	return ret;
}

static void lab_close(struct vfio_device *vdev)
{
	struct lab_device *lab = to_lab(vdev);

	mutex_lock(&lab->lock);
	if (lab->is_v1)
		lab_v1_close(lab);
	else
		lab_v2_reset(lab);
	mutex_unlock(&lab->lock);
}

static int lab_init(struct vfio_device *vdev)
{
	struct lab_device *lab = to_lab(vdev);

	mutex_init(&lab->lock);
	lab->mig_state = VFIO_DEVICE_STATE_RUNNING;
	lab->state_bytes = LAB_BAR_BYTES;
	lab->data_section_bytes = 4096;
	lab->precopy_bytes = 64;
	lab->state = vzalloc(lab->state_bytes);
	lab->log = kzalloc(LOG_BYTES, GFP_KERNEL);
	if (!lab->state || !lab->log)
		return -ENOMEM; /* release follows */
	/* A device of an unassigned vendor, without a class, with one memory BAR. */
	lab->config[PCI_VENDOR_ID] = 0x34;
	lab->config[PCI_VENDOR_ID + 1] = 0x12;
	lab->config[PCI_DEVICE_ID] = 0xab;
	lab->config[PCI_DEVICE_ID + 1] = 0x1a;
	lab->config[PCI_CLASS_DEVICE + 1] = 0xff;
	return 0;
}

static void lab_release(struct vfio_device *vdev)
{
	struct lab_device *lab = to_lab(vdev);

	vfree(lab->state);
	kfree(lab->log);
}

static const struct vfio_device_ops lab_ops = {
	.name = "vmm_lab",
	.init = lab_init,
	.release = lab_release,
	.open_device = lab_open,
	.close_device = lab_close,
	.read = lab_read,
	.write = lab_write,
	.ioctl = lab_ioctl,
	.device_feature = lab_feature,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

/* ---- knobs ---- */

#define KNOB(name, least, most)										\
static ssize_t name##_show(struct device *dev, struct device_attribute *attr, char *buf)		\
{													\
	return sysfs_emit(buf, "%u\n", ((struct lab_device *)dev_get_drvdata(dev))->name);		\
}													\
static ssize_t name##_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count) \
{													\
	struct lab_device *lab = dev_get_drvdata(dev);							\
	u32 value;											\
	int ret = kstrtou32(buf, 0, &value);								\
													\
	if (ret || value < (least) || value > (most))							\
		return ret ? ret : -EINVAL;								\
	mutex_lock(&lab->lock);										\
	lab->name = value;										\
	mutex_unlock(&lab->lock);									\
	return count;											\
}													\
static DEVICE_ATTR_RW(name)

KNOB(data_section_bytes, 16, 1 << 20);
KNOB(chunk_bytes, 0, 1 << 20);
KNOB(delay_us, 0, 10000000);
KNOB(precopy_bytes, 0, 1 << 16);
KNOB(enomsg, 0, 2);
KNOB(refuse_reset, 0, 100);
KNOB(dma_log_errno, 0, MAX_ERRNO);
KNOB(reinit, 0, 15);

static ssize_t state_bytes_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", ((struct lab_device *)dev_get_drvdata(dev))->state_bytes);
}

static ssize_t state_bytes_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	u32 value;
	u8 *state;
	int ret = kstrtou32(buf, 0, &value);

	if (ret || value < LAB_BAR_BYTES || value > MAX_STATE_BYTES)
		return ret ? ret : -EINVAL;
	state = vzalloc(value);
	if (!state)
		return -ENOMEM;
	mutex_lock(&lab->lock);
	memcpy(state, lab->state, min(value, lab->state_bytes));
	swap(state, lab->state);
	lab->state_bytes = value;
	mutex_unlock(&lab->lock);
	vfree(state);
	return count;
}
static DEVICE_ATTR_RW(state_bytes);

static ssize_t refuse_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	u32 from, to, errno, times;

	if (sscanf(buf, "%u %u %u %u", &from, &to, &errno, &times) != 4 || errno == 0 || errno > MAX_ERRNO)
		return -EINVAL;
	mutex_lock(&lab->lock);
	lab->refuse_from = from;
	lab->refuse_to = to;
	lab->refuse_errno = errno;
	lab->refuse_count = times;
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_WO(refuse);

static ssize_t refuse_v1_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	u32 state, times;

	if (sscanf(buf, "%u %u", &state, &times) != 2)
		return -EINVAL;
	mutex_lock(&lab->lock);
	lab->refuse_v1_state = state;
	lab->refuse_v1_count = times;
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_WO(refuse_v1);

static ssize_t data_size_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	u64 value;
	int ret = kstrtou64(buf, 0, &value);

	if (ret)
		return ret;
	mutex_lock(&lab->lock);
	lab->data_size_told = value;
	lab->tells_data_size = true;
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_WO(data_size);

/* Takes effect when the device is opened. */
static ssize_t dma_log_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	bool on;
	int ret = kstrtobool(buf, &on);

	if (ret)
		return ret;
	mutex_lock(&lab->lock);
	lab->vdev.log_ops = on ? &lab_log_ops : NULL;
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_WO(dma_log);

static ssize_t broken_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);

	mutex_lock(&lab->lock);
	lab_v2_break(lab);
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_WO(broken);

static ssize_t log_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct lab_device *lab = dev_get_drvdata(dev);
	ssize_t n;

	mutex_lock(&lab->lock);
	n = sysfs_emit(buf, "%s", lab->log);
	mutex_unlock(&lab->lock);
	return n;
}

static ssize_t log_store(struct device *dev, struct device_attribute *attr, const char *buf, size_t count)
{
	struct lab_device *lab = dev_get_drvdata(dev);

	mutex_lock(&lab->lock);
	lab->log_length = 0;
	lab->log[0] = 0;
	mutex_unlock(&lab->lock);
	return count;
}
static DEVICE_ATTR_RW(log);

static struct attribute *lab_attrs[] = {
	&dev_attr_state_bytes.attr, &dev_attr_data_section_bytes.attr, &dev_attr_chunk_bytes.attr, &dev_attr_delay_us.attr, &dev_attr_precopy_bytes.attr,
	&dev_attr_enomsg.attr, &dev_attr_reinit.attr, &dev_attr_refuse.attr, &dev_attr_refuse_v1.attr, &dev_attr_log.attr,
	&dev_attr_refuse_reset.attr, &dev_attr_data_size.attr, &dev_attr_dma_log.attr, &dev_attr_dma_log_errno.attr, &dev_attr_broken.attr, NULL,
};
static const struct attribute_group lab_group = { .name = "lab", .attrs = lab_attrs };
static const struct attribute_group *lab_groups[] = { &lab_group, NULL };

/* ---- mdev ---- */

struct lab_type {
	struct mdev_type type;
	u32 flags;
};

static struct lab_type lab_types[] = {
	{ { .sysfs_name = "v1", .pretty_name = "migration region" }, 0 },
	{ { .sysfs_name = "v2", .pretty_name = "states" }, VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY },
	{ { .sysfs_name = "v2_nop2p", .pretty_name = "states without P2P" }, VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY },
	{ { .sysfs_name = "v2_noprecopy", .pretty_name = "states without PRE_COPY" }, VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P },
	{ { .sysfs_name = "v2_stopcopy", .pretty_name = "states without P2P and PRE_COPY" }, VFIO_MIGRATION_STOP_COPY },
};
static struct mdev_type *lab_type_list[ARRAY_SIZE(lab_types)];
static struct mdev_parent lab_parent;
static struct device *lab_parent_device;

static int lab_probe(struct mdev_device *mdev)
{
	struct lab_type *type = container_of(mdev->type, struct lab_type, type);
	struct lab_device *lab = vfio_alloc_device(lab_device, vdev, &mdev->dev, &lab_ops);
	int ret;

	if (IS_ERR(lab))
		return PTR_ERR(lab);
	lab->is_v1 = type->flags == 0;
	if (!lab->is_v1) {
		lab->vdev.migration_flags = type->flags;
		lab->vdev.mig_ops = &lab_v2_ops;
	}
	dev_set_drvdata(&mdev->dev, lab);
	ret = vfio_register_emulated_iommu_dev(&lab->vdev);
	if (ret)
		vfio_put_device(&lab->vdev);
	return ret;
}

static void lab_remove(struct mdev_device *mdev)
{
	struct lab_device *lab = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&lab->vdev);
	vfio_put_device(&lab->vdev);
}

static struct mdev_driver lab_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 64,
	.driver = { .name = "vmm_lab", .owner = THIS_MODULE, .mod_name = KBUILD_MODNAME, .dev_groups = lab_groups },
	.probe = lab_probe,
	.remove = lab_remove,
};

static const struct class lab_class = { .name = "vmm_lab" };

static int __init lab_module_init(void)
{
	int i, ret = class_register(&lab_class);

	if (ret)
		return ret;
	for (i = 0; i < ARRAY_SIZE(lab_types); i++)
		lab_type_list[i] = &lab_types[i].type;
	ret = mdev_register_driver(&lab_driver);
	if (ret)
		goto no_driver;
	lab_parent_device = device_create(&lab_class, NULL, MKDEV(0, 0), NULL, "vmm_lab");
	ret = PTR_ERR_OR_ZERO(lab_parent_device);
	if (ret)
		goto no_device;
	ret = mdev_register_parent(&lab_parent, lab_parent_device, &lab_driver, lab_type_list, ARRAY_SIZE(lab_type_list));
	if (!ret)
		return 0;
	device_unregister(lab_parent_device);
no_device:
	mdev_unregister_driver(&lab_driver);
no_driver:
	class_unregister(&lab_class);
	return ret;
}

static void __exit lab_module_exit(void)
{
	mdev_unregister_parent(&lab_parent);
	device_unregister(lab_parent_device);
	mdev_unregister_driver(&lab_driver);
	class_unregister(&lab_class);
}

module_init(lab_module_init);
module_exit(lab_module_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Mediated devices for tests of VM migration");
