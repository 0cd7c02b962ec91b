# SPDX-License-Identifier: Apache-2.0
"""The C structures of the boot protocols, for `GuestMemory.view`; all packed.

Sources: Linux Documentation/arch/x86/boot.rst and zero-page.rst (the names are those of <asm/bootparam.h>, so
that the kernel's documents apply); Xen's PVH start info (xen/include/public/arch-x86/hvm/start_info.h); the
Multiboot Specification 0.6.96, sections 3.1 and 3.3.
"""

LINUX = """
struct setup_header {             /* at 0x1f1 of a bzImage and of boot_params */
    uint8_t  setup_sects;
    uint16_t root_flags;
    uint32_t syssize;
    uint16_t ram_size;
    uint16_t vid_mode;
    uint16_t root_dev;
    uint16_t boot_flag;
    uint16_t jump;
    uint32_t header;              /* "HdrS" */
    uint16_t version;
    uint32_t realmode_swtch;
    uint16_t start_sys_seg;
    uint16_t kernel_version;
    uint8_t  type_of_loader;
    uint8_t  loadflags;
    uint16_t setup_move_size;
    uint32_t code32_start;
    uint32_t ramdisk_image;
    uint32_t ramdisk_size;
    uint32_t bootsect_kludge;
    uint16_t heap_end_ptr;
    uint8_t  ext_loader_ver;
    uint8_t  ext_loader_type;
    uint32_t cmd_line_ptr;
    uint32_t initrd_addr_max;
    uint32_t kernel_alignment;
    uint8_t  relocatable_kernel;
    uint8_t  min_alignment;
    uint16_t xloadflags;
    uint32_t cmdline_size;
    uint32_t hardware_subarch;
    uint64_t hardware_subarch_data;
    uint32_t payload_offset;
    uint32_t payload_length;
    uint64_t setup_data;
    uint64_t pref_address;
    uint32_t init_size;
    uint32_t handover_offset;
    uint32_t kernel_info_offset;
};

struct setup_data {
    uint64_t next;
    uint32_t type;
    uint32_t len;
};

struct boot_e820_entry {
    uint64_t addr;
    uint64_t size;
    uint32_t type;
};

struct screen_info {
    uint8_t  orig_x;
    uint8_t  orig_y;
    uint16_t ext_mem_k;
    uint16_t orig_video_page;
    uint8_t  orig_video_mode;
    uint8_t  orig_video_cols;
    uint8_t  flags;
    uint8_t  unused2;
    uint16_t orig_video_ega_bx;
    uint16_t unused3;
    uint8_t  orig_video_lines;
    uint8_t  orig_video_isVGA;
    uint16_t orig_video_points;
    uint16_t lfb_width;
    uint16_t lfb_height;
    uint16_t lfb_depth;
    uint32_t lfb_base;
    uint32_t lfb_size;
    uint16_t cl_magic;
    uint16_t cl_offset;
    uint16_t lfb_linelength;
    uint8_t  red_size;
    uint8_t  red_pos;
    uint8_t  green_size;
    uint8_t  green_pos;
    uint8_t  blue_size;
    uint8_t  blue_pos;
    uint8_t  rsvd_size;
    uint8_t  rsvd_pos;
    uint16_t vesapm_seg;
    uint16_t vesapm_off;
    uint16_t pages;
    uint16_t vesa_attributes;
    uint32_t capabilities;
    uint32_t ext_lfb_base;
    uint8_t  _reserved[2];
};

struct efi_info {
    uint32_t efi_loader_signature;
    uint32_t efi_systab;
    uint32_t efi_memdesc_size;
    uint32_t efi_memdesc_version;
    uint32_t efi_memmap;
    uint32_t efi_memmap_size;
    uint32_t efi_systab_hi;
    uint32_t efi_memmap_hi;
};

struct boot_params {              /* the "zero page" */
    struct screen_info screen_info;              /* 0x000 */
    uint8_t  apm_bios_info[20];
    uint8_t  _pad2[4];
    uint64_t tboot_addr;                         /* 0x058 */
    uint8_t  ist_info[16];
    uint64_t acpi_rsdp_addr;                     /* 0x070 */
    uint8_t  _pad3[8];
    uint8_t  hd0_info[16];
    uint8_t  hd1_info[16];
    uint8_t  sys_desc_table[16];
    uint8_t  olpc_ofw_header[16];
    uint32_t ext_ramdisk_image;                  /* 0x0c0 */
    uint32_t ext_ramdisk_size;
    uint32_t ext_cmd_line_ptr;
    uint8_t  _pad4[112];
    uint32_t cc_blob_address;
    uint8_t  edid_info[128];
    struct efi_info efi_info;                    /* 0x1c0 */
    uint32_t alt_mem_k;
    uint32_t scratch;
    uint8_t  e820_entries;                       /* 0x1e8 */
    uint8_t  eddbuf_entries;
    uint8_t  edd_mbr_sig_buf_entries;
    uint8_t  kbd_status;
    uint8_t  secure_boot;
    uint8_t  _pad5[2];
    uint8_t  sentinel;                           /* 0x1ef */
    uint8_t  _pad6[1];
    struct setup_header hdr;                     /* 0x1f1 */
    uint8_t  _pad7[36];
    uint32_t edd_mbr_sig_buffer[16];             /* 0x290 */
    struct boot_e820_entry e820_table[128];      /* 0x2d0 */
    uint8_t  _pad8[48];
    uint8_t  eddbuf[492];                        /* 0xd00 */
    uint8_t  _pad9[276];
};
"""

PVH = """
struct hvm_start_info {
    uint32_t magic;               /* 0x336ec578 */
    uint32_t version;
    uint32_t flags;
    uint32_t nr_modules;
    uint64_t modlist_paddr;
    uint64_t cmdline_paddr;
    uint64_t rsdp_paddr;
    uint64_t memmap_paddr;        /* from here on: version 1 */
    uint32_t memmap_entries;
    uint32_t reserved;
};

struct hvm_modlist_entry {
    uint64_t paddr;
    uint64_t size;
    uint64_t cmdline_paddr;
    uint64_t reserved;
};

struct hvm_memmap_table_entry {
    uint64_t addr;
    uint64_t size;
    uint32_t type;
    uint32_t reserved;
};
"""

MULTIBOOT = """
struct multiboot_header {
    uint32_t magic;               /* 0x1badb002 */
    uint32_t flags;
    uint32_t checksum;
    uint32_t header_addr;
    uint32_t load_addr;
    uint32_t load_end_addr;
    uint32_t bss_end_addr;
    uint32_t entry_addr;
    uint32_t mode_type;
    uint32_t width;
    uint32_t height;
    uint32_t depth;
};

struct multiboot_info {
    uint32_t flags;
    uint32_t mem_lower;
    uint32_t mem_upper;
    uint32_t boot_device;
    uint32_t cmdline;
    uint32_t mods_count;
    uint32_t mods_addr;
    uint32_t syms[4];
    uint32_t mmap_length;
    uint32_t mmap_addr;
    uint32_t drives_length;
    uint32_t drives_addr;
    uint32_t config_table;
    uint32_t boot_loader_name;
    uint32_t apm_table;
    uint32_t vbe_control_info;
    uint32_t vbe_mode_info;
    uint16_t vbe_mode;
    uint16_t vbe_interface_seg;
    uint16_t vbe_interface_off;
    uint16_t vbe_interface_len;
    uint64_t framebuffer_addr;
    uint32_t framebuffer_pitch;
    uint32_t framebuffer_width;
    uint32_t framebuffer_height;
    uint8_t  framebuffer_bpp;
    uint8_t  framebuffer_type;
    uint8_t  color_info[6];
};

struct multiboot_mod_list {
    uint32_t mod_start;
    uint32_t mod_end;
    uint32_t cmdline;
    uint32_t pad;
};

struct multiboot_mmap_entry {
    uint32_t size;                /* of what follows */
    uint64_t addr;
    uint64_t len;
    uint32_t type;
};
"""
