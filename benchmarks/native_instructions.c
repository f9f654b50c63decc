/* Plugin of qemu: prints the number of executed guest instructions when the program ends. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* From qemu-plugin.h, version 1 of the interface, which distributions seldom package. */
typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translated);
void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

int qemu_plugin_version = 1;
static uint64_t count;

static void block(qemu_plugin_id_t id, struct qemu_plugin_tb *translated)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(
        translated, QEMU_PLUGIN_INLINE_ADD_U64, &count, qemu_plugin_tb_n_insns(translated));
}

static void finished(qemu_plugin_id_t id, void *data)
{
    (void)id;
    (void)data;
    fprintf(stderr, "%llu instructions\n", (unsigned long long)count);
}

int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
    (void)info;
    (void)argc;
    (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, block);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
