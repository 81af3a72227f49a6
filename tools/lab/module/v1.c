// SPDX-License-Identifier: GPL-2.0-only
/* Migration protocol v1: a region whose first 32 bytes are registers and whose data section takes one chunk at a time. */
#include <linux/vmalloc.h>
#include "vmm_lab.h"

#define RUNNING 1
#define SAVING 2
#define RESUMING 4
#define BROKEN 6

int lab_v1_open(struct lab_device *lab)
{
	lab->data = vzalloc(lab->data_section_bytes);
	lab->v1_state = RUNNING;
	return lab->data ? 0 : -ENOMEM;
}

void lab_v1_close(struct lab_device *lab)
{
	lab_v1_reset(lab);
	vfree(lab->data);
	lab->data = NULL;
}

void lab_v1_reset(struct lab_device *lab)
{
	lab_out_end(lab);
	lab_load_end(lab);
	lab->out_at = lab->staged = 0;
	lab->v1_state = RUNNING;
}

/* The reader has taken the chunk that was staged last. */
static void consume(struct lab_device *lab)
{
	lab->out_at += lab->staged;
	lab->staged = 0;
}

static void stage(struct lab_device *lab)
{
	size_t left;

	consume(lab);
	left = lab_out_length(lab) - lab->out_at;
	lab->staged = min_t(size_t, left, lab->data_section_bytes);
	if (lab->chunk_bytes)
		lab->staged = min_t(size_t, lab->staged, lab->chunk_bytes);
	lab_out_copy(lab, lab->out_at, lab->data, lab->staged);
}

static int enter(struct lab_device *lab, u32 value)
{
	u32 old = lab->v1_state & 7, new = value & 7;
	int ret = 0;

	if (new > RESUMING)
		return -EINVAL;
	if (lab->refuse_v1_count && lab->refuse_v1_state == new) {
		lab->refuse_v1_count--;
		lab->v1_state = BROKEN;
		return -EIO;
	}
	if (old == BROKEN)
		return -EIO;
	if (old == RESUMING && new != RESUMING) {
		ret = lab_load_finish(lab);
		lab_load_end(lab);
		if (ret) {
			lab->v1_state = BROKEN;
			return ret;
		}
	}
	if (old != RESUMING && new == RESUMING) {
		ret = lab_load_start(lab);
	} else if ((new & SAVING) && !(old & SAVING)) {
		lab->out_at = lab->staged = 0;
		ret = lab_out_start(lab, new & RUNNING);
		if (!ret && !(new & RUNNING))
			lab_out_state(lab);
	} else if (new == SAVING && old == (SAVING | RUNNING)) {
		lab_out_state(lab);
	} else if ((old & SAVING) && !(new & SAVING)) {
		lab_out_end(lab);
		lab->out_at = lab->staged = 0;
	}
	if (ret)
		return ret;
	lab->v1_state = value;
	if (old != new)
		lab_note(lab, new);
	return 0;
}

static u64 read_register(struct lab_device *lab, u64 at)
{
	switch (at) {
	case 0:
		return lab->v1_state;
	case 8:
		if (!(lab->v1_state & SAVING))
			return 0;
		consume(lab);
		return lab_out_length(lab) - lab->out_at;
	case 16:
		if (lab->v1_state & SAVING)
			stage(lab);
		return LAB_V1_DATA;
	case 24:
		return lab->staged;
	default:
		return 0;
	}
}

int lab_v1_access(struct lab_device *lab, u64 offset, u8 *bytes, size_t length, bool write)
{
	u64 value = 0;

	if (offset >= LAB_V1_DATA) {
		u8 *at = lab->data + (offset - LAB_V1_DATA);

		memcpy(write ? at : bytes, write ? bytes : at, length);
		return 0;
	}
	/* Each register at its own width: the state has four bytes, the others eight. */
	if (!((offset == 0 && length == 4) || ((offset == 8 || offset == 16 || offset == 24) && length == 8)))
		return -EINVAL;
	if (!write) {
		value = read_register(lab, offset);
		memcpy(bytes, &value, length);
		return 0;
	}
	memcpy(&value, bytes, length);
	if (offset == 0)
		return enter(lab, value);
	if (offset != 24 || (lab->v1_state & 7) != RESUMING || value > lab->data_section_bytes)
		return -EINVAL;
	return lab_load_add(lab, lab->data, value);
}
