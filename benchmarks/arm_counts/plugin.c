// A plugin of QEMU's user-mode emulation that counts the instructions that a program executes:
//   qemu-aarch64 -plugin plugin.so,out=FILE PROGRAM
// At each call of getppid the number so far is written as a line of FILE. What the plugin needs of QEMU's
// interface stands here, since Debian's package has no header for it.
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t Id;
typedef struct qemu_plugin_tb Block;  // instructions that are executed one after the other
typedef void Syscall(Id, unsigned processor, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, Block*));
void qemu_plugin_register_vcpu_tb_exec_inline(Block*, int operation, void* counter, uint64_t summand);
void qemu_plugin_register_vcpu_syscall_cb(Id, Syscall*);
size_t qemu_plugin_tb_n_insns(const Block*);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t executed;  // by all threads; exact where one of them runs at a time
static FILE* out;

static void translated(Id id, Block* block) {
  (void)id;
  const int kAdd = 0;
  qemu_plugin_register_vcpu_tb_exec_inline(block, kAdd, &executed, qemu_plugin_tb_n_insns(block));
}

static void called(Id id, unsigned processor, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)processor, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  const int64_t kGetppid = 173;
  if (number != kGetppid) return;
  fprintf(out, "%" PRIu64 "\n", executed);
  fflush(out);
}

__attribute__((visibility("default"))) int qemu_plugin_install(Id id, const void* info, int count,
                                                               char** arguments) {
  (void)info;
  if (count != 1 || strncmp(arguments[0], "out=", 4) != 0) return 1;
  out = fopen(arguments[0] + 4, "w");
  if (out == NULL) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
