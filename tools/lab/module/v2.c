// SPDX-License-Identifier: GPL-2.0-only
/* Migration protocol v2: states, a descriptor for each session, and faults on request. */
#include <linux/anon_inodes.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "vmm_lab.h"

/* Not in the headers of the kernel that this is built for. */
#define LAB_FEATURE_PRECOPY_INFO_V2 12
#define LAB_PRECOPY_REINIT 1

#define BOUNCE_BYTES (64 * 1024)

/* A session. The device and the file both hold a reference; when the device ends the session, the file keeps a dead one. */
struct lab_stream {
	struct kref kref;
	struct mutex lock;
	struct lab_device *lab;
	size_t at;
	bool dead;
};

static void free_stream(struct kref *kref)
{
	kfree(container_of(kref, struct lab_stream, kref));
}

static void end_stream(struct lab_device *lab)
{
	struct lab_stream *stream = lab->stream;

	if (!stream)
		return;
	lab->stream = NULL;
	mutex_lock(&stream->lock);
	stream->dead = true;
	mutex_unlock(&stream->lock);
	kref_put(&stream->kref, free_stream);
	lab_out_end(lab);
	lab_load_end(lab);
}

static bool in_precopy(struct lab_device *lab)
{
	return lab->mig_state == VFIO_DEVICE_STATE_PRE_COPY || lab->mig_state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

static void pause_a_little(struct lab_device *lab)
{
	u32 us = READ_ONCE(lab->delay_us);

	if (us)
		usleep_range(us, us + us / 4 + 1);
}

static size_t bounded(struct lab_device *lab, size_t count)
{
	count = min_t(size_t, count, BOUNCE_BYTES);
	return lab->chunk_bytes ? min_t(size_t, count, lab->chunk_bytes) : count;
}

static ssize_t stream_read(struct file *file, char __user *to, size_t count, loff_t *pos)
{
	struct lab_stream *stream = file->private_data;
	struct lab_device *lab;
	ssize_t ret = -ENODEV;
	u8 *bounce;

	if (pos)
		return -ESPIPE;
	bounce = kvmalloc(BOUNCE_BYTES, GFP_KERNEL);
	if (!bounce)
		return -ENOMEM;
	mutex_lock(&stream->lock);
	lab = stream->lab;
	if (!stream->dead) {
		pause_a_little(lab);
		ret = min_t(size_t, bounded(lab, count), lab_out_length(lab) - stream->at);
		if (ret) {
			lab_out_copy(lab, stream->at, bounce, ret);
			if (copy_to_user(to, bounce, ret))
				ret = -EFAULT;
			else
				stream->at += ret;
		} else if (count && (in_precopy(lab) ? lab->enomsg : lab->enomsg == 2)) {
			ret = -ENOMSG;
		}
	}
	mutex_unlock(&stream->lock);
	kvfree(bounce);
	return ret;
}

static ssize_t stream_write(struct file *file, const char __user *from, size_t count, loff_t *pos)
{
	struct lab_stream *stream = file->private_data;
	ssize_t ret = -ENODEV;
	u8 *bounce;

	if (pos)
		return -ESPIPE;
	bounce = kvmalloc(BOUNCE_BYTES, GFP_KERNEL);
	if (!bounce)
		return -ENOMEM;
	mutex_lock(&stream->lock);
	if (!stream->dead) {
		pause_a_little(stream->lab);
		count = bounded(stream->lab, count);
		ret = copy_from_user(bounce, from, count) ? -EFAULT : lab_load_add(stream->lab, bounce, count);
		if (!ret)
			ret = count;
	}
	mutex_unlock(&stream->lock);
	kvfree(bounce);
	return ret;
}

static long stream_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct lab_stream *stream = file->private_data;
	struct vfio_precopy_info info = {};
	const size_t minimum = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct lab_device *lab;
	long ret = 0;

	if (command != VFIO_MIG_GET_PRECOPY_INFO || !(file->f_mode & FMODE_READ))
		return -ENOTTY;
	if (copy_from_user(&info, (void __user *)argument, minimum))
		return -EFAULT;
	if (info.argsz < minimum)
		return -EINVAL;
	mutex_lock(&stream->lock);
	lab = stream->lab;
	if (stream->dead) {
		ret = -ENODEV;
	} else if (!in_precopy(lab)) {
		ret = -EINVAL;
	} else {
		info.flags = 0;
		if (stream->at == lab_out_length(lab) && lab->reinit_left && lab->precopy_info_v2) {
			lab->reinit_left--;
			lab_out_first(lab);
			info.flags = LAB_PRECOPY_REINIT;
		}
		info.initial_bytes = lab_out_length(lab) - stream->at;
		info.dirty_bytes = 0;
	}
	mutex_unlock(&stream->lock);
	if (!ret && copy_to_user((void __user *)argument, &info, minimum))
		ret = -EFAULT;
	return ret;
}

static int stream_release(struct inode *inode, struct file *file)
{
	struct lab_stream *stream = file->private_data;

	kref_put(&stream->kref, free_stream);
	return 0;
}

static const struct file_operations saving_fops = {
	.owner = THIS_MODULE,
	.read = stream_read,
	.unlocked_ioctl = stream_ioctl,
	.release = stream_release,
};

static const struct file_operations loading_fops = {
	.owner = THIS_MODULE,
	.write = stream_write,
	.unlocked_ioctl = stream_ioctl,
	.release = stream_release,
};

static struct file *new_session(struct lab_device *lab, bool saving)
{
	struct lab_stream *stream = kzalloc(sizeof(*stream), GFP_KERNEL_ACCOUNT);
	struct file *file;

	if (!stream)
		return ERR_PTR(-ENOMEM);
	kref_init(&stream->kref);
	mutex_init(&stream->lock);
	stream->lab = lab;
	file = anon_inode_getfile("[vmm_lab]", saving ? &saving_fops : &loading_fops, stream, saving ? O_RDONLY : O_WRONLY);
	if (IS_ERR(file)) {
		kfree(stream);
		return file;
	}
	stream_open(file->f_inode, file);
	kref_get(&stream->kref);
	lab->stream = stream;
	return file;
}

static bool is_saving(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_STOP_COPY || state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

/* Walks one arc; returns the file of the session that the arc opens, if any. */
static struct file *step(struct lab_device *lab, enum vfio_device_mig_state next)
{
	enum vfio_device_mig_state now = lab->mig_state;
	int ret;

	if (lab->refuse_count && lab->refuse_from == now && lab->refuse_to == next) {
		lab->refuse_count--;
		return ERR_PTR(-(long)lab->refuse_errno);
	}
	if (now == VFIO_DEVICE_STATE_RESUMING) {
		ret = lab_load_finish(lab);
		if (ret)
			return ERR_PTR(ret);
		end_stream(lab);
	}
	if (next == VFIO_DEVICE_STATE_RESUMING) {
		ret = lab_load_start(lab);
		return ret ? ERR_PTR(ret) : new_session(lab, false);
	}
	if (is_saving(now) && is_saving(next)) {
		mutex_lock(&lab->stream->lock);
		if (next == VFIO_DEVICE_STATE_STOP_COPY)
			lab_out_state(lab);
		mutex_unlock(&lab->stream->lock);
	} else if (is_saving(next)) {
		ret = lab_out_start(lab, next != VFIO_DEVICE_STATE_STOP_COPY);
		if (ret)
			return ERR_PTR(ret);
		if (next == VFIO_DEVICE_STATE_STOP_COPY)
			lab_out_state(lab);
		return new_session(lab, true);
	} else if (is_saving(now)) {
		end_stream(lab);
	}
	return NULL;
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state target)
{
	struct lab_device *lab = to_lab(vdev);
	struct file *file = NULL;

	mutex_lock(&lab->lock);
	if (lab->mig_state == VFIO_DEVICE_STATE_ERROR) {
		mutex_unlock(&lab->lock);
		return ERR_PTR(-EIO);
	}
	while (lab->mig_state != target) {
		enum vfio_device_mig_state next;
		int ret = vfio_mig_get_next_state(vdev, lab->mig_state, target, &next);

		if (ret) {
			file = ERR_PTR(ret);
			break;
		}
		file = step(lab, next);
		if (IS_ERR(file))
			break;
		lab->mig_state = next;
		lab_note(lab, next);
	}
	mutex_unlock(&lab->lock);
	return file;
}

static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct lab_device *lab = to_lab(vdev);

	mutex_lock(&lab->lock);
	*state = lab->mig_state;
	mutex_unlock(&lab->lock);
	return 0;
}

static int get_data_size(struct vfio_device *vdev, unsigned long *length)
{
	struct lab_device *lab = to_lab(vdev);

	*length = lab->tells_data_size ? lab->data_size_told : lab->state_bytes + sizeof(struct lab_record);
	return 0;
}

/* The device writes no memory, so its log is always empty. */
static int log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes, u64 *page_size)
{
	return 0;
}

static int log_stop(struct vfio_device *vdev)
{
	return 0;
}

static int log_read_and_clear(struct vfio_device *vdev, unsigned long iova, unsigned long length, struct iova_bitmap *dirty)
{
	return -(int)to_lab(vdev)->dma_log_errno;
}

const struct vfio_log_ops lab_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_read_and_clear,
};

const struct vfio_migration_ops lab_v2_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
	.migration_get_data_size = get_data_size,
};

void lab_v2_break(struct lab_device *lab)
{
	end_stream(lab);
	lab->mig_state = VFIO_DEVICE_STATE_ERROR;
}

void lab_v2_reset(struct lab_device *lab)
{
	end_stream(lab);
	lab->mig_state = VFIO_DEVICE_STATE_RUNNING;
}

long lab_v2_feature(struct lab_device *lab, u32 flags, size_t argsz)
{
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != LAB_FEATURE_PRECOPY_INFO_V2 || lab->is_v1)
		return -ENOTTY;
	if (!(lab->vdev.migration_flags & VFIO_MIGRATION_PRE_COPY))
		return -EINVAL;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0);
	if (ret == 1) {
		lab->precopy_info_v2 = true;
		ret = 0;
	}
	return ret;
}
