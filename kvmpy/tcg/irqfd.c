/* SPDX-License-Identifier: Apache-2.0
 *
 * irqfd (api.rst 4.75): an eventfd that raises a GSI. One thread per VM waits for all of them. A resampled one
 * holds its line until the guest's EOI, which signals the second eventfd. The list is under the chips lock, so
 * after KVM_IRQFD_FLAG_DEASSIGN returns no interrupt of that eventfd comes any more.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "event.h"
#include "vm.h"

struct irqfd {
    struct irqfd *next;
    uint64_t number; /* tells a late epoll event of a removed irqfd from one of its successor */
    uint32_t gsi;
    struct event trigger, resample;
    bool resampled;
};

struct irqfds {
    struct irqfd *first;
    uint64_t last_number; /* 0 is the stop event */
    int epoll, stop;
    pthread_t thread;
};

static void trigger(struct tcg_vm *vm, struct irqfd *irqfd)
{
    if (!event_take(&irqfd->trigger))
        return;
    if (irqfd->resampled) {
        irq_set(vm, irqfd->gsi, SOURCE_RESAMPLE, true);
    } else {
        irq_set(vm, irqfd->gsi, SOURCE_USER, true);
        irq_set(vm, irqfd->gsi, SOURCE_USER, false);
    }
}

static void *irqfd_thread(void *opaque)
{
    struct tcg_vm *vm = opaque;
    struct epoll_event events[16];
    for (;;) {
        int count = epoll_wait(vm->irqfds->epoll, events, 16, -1);
        for (int i = 0; i < count; i++) {
            if (!events[i].data.u64)
                return NULL;
            pthread_mutex_lock(&vm->chips_lock);
            for (struct irqfd *irqfd = vm->irqfds->first; irqfd; irqfd = irqfd->next)
                if (irqfd->number == events[i].data.u64)
                    trigger(vm, irqfd);
            pthread_mutex_unlock(&vm->chips_lock);
        }
    }
}

/* With the first irqfd of a VM. vm.lock held. */
static int start(struct tcg_vm *vm)
{
    struct irqfds *all = calloc(1, sizeof *all);
    if (!all)
        return -ENOMEM;
    all->epoll = epoll_create1(EPOLL_CLOEXEC);
    all->stop = eventfd(0, EFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0};
    int error = all->epoll < 0 || all->stop < 0 || epoll_ctl(all->epoll, EPOLL_CTL_ADD, all->stop, &event) < 0 ? errno : 0;
    vm->irqfds = all;
    if (!error) {
        sigset_t block, old;
        sigfillset(&block);
        pthread_sigmask(SIG_SETMASK, &block, &old);
        error = pthread_create(&all->thread, NULL, irqfd_thread, vm);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
    }
    if (error) {
        vm->irqfds = NULL;
        if (all->epoll >= 0)
            close(all->epoll);
        if (all->stop >= 0)
            close(all->stop);
        free(all);
    }
    return -error;
}

static void release(struct irqfd *irqfd)
{
    event_release(&irqfd->trigger);
    if (irqfd->resampled)
        event_release(&irqfd->resample);
    free(irqfd);
}

static long assign(struct tcg_vm *vm, const struct kvm_irqfd *request)
{
    bool resampled = request->flags & KVM_IRQFD_FLAG_RESAMPLE;
    if (resampled ? !vm->has_pic : !vm->has_lapics)
        return -EINVAL;
    if (request->gsi >= MAX_GSI)
        return -EINVAL;
    int error = vm->irqfds ? 0 : start(vm);
    if (error)
        return error;
    struct irqfd *irqfd = calloc(1, sizeof *irqfd);
    if (!irqfd)
        return -ENOMEM;
    irqfd->gsi = request->gsi;
    error = event_hold(&irqfd->trigger, (int)request->fd);
    if (error) {
        free(irqfd);
        return error;
    }
    if (resampled) {
        error = event_hold(&irqfd->resample, (int)request->resamplefd);
        irqfd->resampled = !error;
    }
    for (struct irqfd *other = vm->irqfds->first; other && !error; other = other->next)
        if (other->trigger.id == irqfd->trigger.id)
            error = -EBUSY; /* one eventfd, one GSI */
    if (error) {
        release(irqfd);
        return error;
    }
    pthread_mutex_lock(&vm->chips_lock);
    irqfd->number = ++vm->irqfds->last_number;
    irqfd->next = vm->irqfds->first;
    vm->irqfds->first = irqfd;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = irqfd->number};
    if (epoll_ctl(vm->irqfds->epoll, EPOLL_CTL_ADD, irqfd->trigger.fd, &event) < 0) {
        error = -errno;
        vm->irqfds->first = irqfd->next;
    }
    pthread_mutex_unlock(&vm->chips_lock);
    if (error)
        release(irqfd);
    return error;
}

/* No error when there is none: the kernel gives none either. */
static long deassign(struct tcg_vm *vm, const struct kvm_irqfd *request)
{
    struct event wanted;
    int error = event_hold(&wanted, (int)request->fd);
    if (error)
        return error;
    struct irqfd *removed = NULL;
    pthread_mutex_lock(&vm->chips_lock);
    struct irqfd **link = vm->irqfds ? &vm->irqfds->first : NULL;
    while (link && *link) {
        struct irqfd *irqfd = *link;
        if (irqfd->trigger.id != wanted.id || irqfd->gsi != request->gsi) {
            link = &irqfd->next;
            continue;
        }
        *link = irqfd->next;
        irqfd->next = removed;
        removed = irqfd;
        epoll_ctl(vm->irqfds->epoll, EPOLL_CTL_DEL, irqfd->trigger.fd, NULL);
        if (irqfd->resampled)
            irq_set(vm, irqfd->gsi, SOURCE_RESAMPLE, false);
    }
    pthread_mutex_unlock(&vm->chips_lock);
    while (removed) {
        struct irqfd *next = removed->next;
        release(removed);
        removed = next;
    }
    event_release(&wanted);
    return 0;
}

long irqfd_ioctl(struct tcg_vm *vm, const struct kvm_irqfd *request)
{
    if (request->flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE))
        return -EINVAL;
    return request->flags & KVM_IRQFD_FLAG_DEASSIGN ? deassign(vm, request) : assign(vm, request);
}

void irqfd_eoi(struct tcg_vm *vm, uint32_t gsi)
{
    bool lowered = false;
    for (struct irqfd *irqfd = vm->irqfds ? vm->irqfds->first : NULL; irqfd; irqfd = irqfd->next) {
        if (!irqfd->resampled || irqfd->gsi != gsi)
            continue;
        if (!lowered)
            irq_set(vm, gsi, SOURCE_RESAMPLE, false);
        lowered = true;
        event_signal(&irqfd->resample);
    }
}

void irqfd_free(struct tcg_vm *vm)
{
    struct irqfds *all = vm->irqfds;
    if (!all)
        return;
    uint64_t one = 1;
    if (write(all->stop, &one, sizeof one) == sizeof one)
        pthread_join(all->thread, NULL);
    while (all->first) {
        struct irqfd *next = all->first->next;
        release(all->first);
        all->first = next;
    }
    close(all->epoll);
    close(all->stop);
    free(all);
    vm->irqfds = NULL;
}
