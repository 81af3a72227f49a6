/* SPDX-License-Identifier: GPL-2.0-only */
/* Mediated devices for migration tests; README.md says what they do. */
#ifndef VMM_LAB_H
#define VMM_LAB_H

#include <linux/mutex.h>
#include <linux/types.h>
#include <linux/vfio.h>

#define LAB_CONFIG_BYTES 256
#define LAB_BAR_BYTES 4096
#define LAB_V1_INDEX 9
#define LAB_V1_DATA 0x1000
#define LAB_RECORD_MAGIC 0x42414c56 /* VLAB */
#define LAB_RECORD_FIRST 1
#define LAB_RECORD_STATE 2
#define LAB_SLACK_BYTES (1 << 20)
#define LAB_OFFSET_SHIFT 40

/* Records carry the state: first those of PRE_COPY, then that of the state. */
struct lab_record {
	__le32 magic;
	__le32 type;
	__le64 length;
};

/* The data of a session: the head (records, and the header of the state's record), then the device's memory. */
struct lab_out {
	u8 *head;
	size_t head_length, head_capacity;
	bool has_state;
};

struct lab_stream;

struct lab_device {
	struct vfio_device vdev;
	struct mutex lock;
	bool is_v1;
	u8 config[LAB_CONFIG_BYTES];
	u8 *state;
	size_t loaded_length;
	u8 *loaded;
	struct lab_out out;

	/* knobs */
	u32 state_bytes, data_section_bytes, chunk_bytes, delay_us, precopy_bytes, enomsg, reinit;
	u32 refuse_from, refuse_to, refuse_errno, refuse_count, refuse_v1_state, refuse_v1_count, refuse_reset, dma_log_errno;
	u64 data_size_told;
	bool tells_data_size;
	char *log;
	size_t log_length;

	/* v2 */
	enum vfio_device_mig_state mig_state;
	struct lab_stream *stream;
	u32 reinit_left;
	bool precopy_info_v2;

	/* v1 */
	u32 v1_state;
	u8 *data;
	size_t out_at, staged;
	u64 data_size;
};

static inline struct lab_device *to_lab(struct vfio_device *vdev)
{
	return container_of(vdev, struct lab_device, vdev);
}

void lab_note(struct lab_device *lab, unsigned int state);
int lab_out_start(struct lab_device *lab, bool precopy);
void lab_out_first(struct lab_device *lab);
void lab_out_state(struct lab_device *lab);
void lab_out_end(struct lab_device *lab);
size_t lab_out_length(struct lab_device *lab);
void lab_out_copy(struct lab_device *lab, size_t at, u8 *to, size_t length);
int lab_load_start(struct lab_device *lab);
int lab_load_add(struct lab_device *lab, const u8 *from, size_t length);
int lab_load_finish(struct lab_device *lab);
void lab_load_end(struct lab_device *lab);

extern const struct vfio_migration_ops lab_v2_ops;
extern const struct vfio_log_ops lab_log_ops;
void lab_v2_reset(struct lab_device *lab);
void lab_v2_break(struct lab_device *lab);
long lab_v2_feature(struct lab_device *lab, u32 flags, size_t argsz);

int lab_v1_open(struct lab_device *lab);
void lab_v1_close(struct lab_device *lab);
void lab_v1_reset(struct lab_device *lab);
int lab_v1_access(struct lab_device *lab, u64 offset, u8 *bytes, size_t length, bool write);

#endif
