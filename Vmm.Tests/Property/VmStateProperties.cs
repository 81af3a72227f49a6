using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;

namespace Vmm.Tests.Property;

[TestFixture]
public sealed class VmStateProperties
{
    [Test]
    public void RandomDescriptionsRoundTrip([Range(1, 300)] int seed)
    {
        var made = new RandomVmState(seed);
        IVmStateSection source = made.Description.Bind(made.NewOwner(seed + 1));
        byte[] body = SectionBytes.Save(source);
        // The load gives the same result in a new owner and in one with other content.
        foreach (RandomVmState.Bag owner in new[] { made.NewOwner(), made.NewOwner(seed + 2) })
        {
            IVmStateSection target = made.Description.Bind(owner);
            SectionBytes.Load(target, body, inSingleBytes: seed % 2 == 0);
            Assert.That(SectionBytes.Save(target), Is.EqualTo(body));
        }
        foreach (VmDescOptions form in new[] { VmDescOptions.Qemu111, VmDescOptions.Qemu100 })
            Assert.That(SectionBytes.DescribedLength(SectionBytes.Describe(source, form)), Is.EqualTo(body.Length), "VMDESC");
    }

    [Test]
    public void EveryProperPrefixOfARandomBodyFails([Range(1, 40)] int seed)
    {
        var made = new RandomVmState(seed);
        byte[] framed = SectionBytes.Frame(SectionBytes.Save(made.Description.Bind(made.NewOwner(seed))));
        int step = Math.Max(1, framed.Length / 200);
        for (int n = 0; n < framed.Length; n += step)
        {
            IVmStateSection target = made.Description.Bind(made.NewOwner());
            Exception? error = Caught.By(() => SectionBytes.LoadFramed(target, framed.AsSpan(0, n), target.VersionId));
            Assert.That(error, Is.InstanceOf<VmmException>(), $"{n} of {framed.Length} bytes");
        }
    }
}
