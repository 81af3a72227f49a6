using Vmm.Core.Kvm;
using Vmm.Tests.Unit.Vfio;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>Our view of the kernel's KVM header equals a C compiler's.</summary>
internal sealed class KvmLayoutTests
{
    private const string Prologue = "#include <stddef.h>\n#include <linux/kvm.h>\n";

    [Test]
    public void Every_size_offset_and_number_is_the_compilers()
    {
        List<UapiItem> items =
        [
            .. UapiItems.Of(typeof(KvmUapi), "kvm_", static f => f.Name.StartsWith("KVM_", StringComparison.Ordinal)),
            .. KvmUapi.OpaqueSizes.Select(static o => new UapiItem($"sizeof({o.C})", $"sizeof(struct {o.C})", (ulong)o.Bytes)),
            .. KvmUapi.RunOffsets.Select(static o => new UapiItem($"kvm_run.{o.C}", $"offsetof(struct kvm_run, {o.C})", (ulong)o.Offset)),
        ];
        using var folder = new Support.TempDirectory();
        Dictionary<string, ulong> theirs = UapiLayoutTests.Ask(folder, Prologue, [], items);
        Assert.That(items, Has.Count.GreaterThan(200));
        Assert.That(items.Where(i => theirs[i.Name] != i.Ours).Select(i => $"{i.Name}: ours {i.Ours}, theirs {theirs[i.Name]}"), Is.Empty);
    }
}
