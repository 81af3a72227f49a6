using Vmm.Core.Errors;
using Vmm.Core.SaveVm;
using Vmm.Tests.Support;

namespace Vmm.Tests.Contract;

/// <summary>The laws that every declared section keeps; the fixture of each device inherits them.</summary>
/// <typeparam name="TDevice">The device that owns the section's state.</typeparam>
public abstract class SaveVmContract<TDevice> where TDevice : class
{
    /// <summary>Creates a device in its power-on state, and its section.</summary>
    protected abstract (TDevice Device, IVmStateSection Section) Create();

    /// <summary>States that differ from power-on. Together they change every field and send every subsection.</summary>
    protected abstract IEnumerable<(string Name, Action<TDevice> Apply)> States();

    /// <summary>Resets the device to its power-on state.</summary>
    protected abstract void Reset(TDevice device);

    /// <summary>A body of the oldest version that loads, and the body that the device must save after that load.</summary>
    protected abstract (byte[] Body, byte[] SavedAfterwards) OldestVersion();

    [Test]
    public void SaveLoadSaveGivesTheSameBytes() => EachState((name, body, section) =>
    {
        IVmStateSection other = Create().Section;
        SectionBytes.Load(other, body);
        Assert.That(SectionBytes.Save(other), Is.EqualTo(body), name);
        SectionBytes.Load(section, body);
        Assert.That(SectionBytes.Save(section), Is.EqualTo(body), $"{name}, into itself");
    });

    [Test]
    public void SavingChangesNothing() => EachState((name, body, section) => Assert.That(SectionBytes.Save(section), Is.EqualTo(body), name));

    [Test]
    public void StatesDifferFromPowerOn()
    {
        byte[] fresh = SectionBytes.Save(Create().Section);
        EachState((name, body, _) => Assert.That(body, Is.Not.EqualTo(fresh), name));
    }

    [Test]
    public void EveryProperPrefixFails() => EachState((name, body, _) =>
    {
        byte[] framed = SectionBytes.Frame(body);
        Assert.DoesNotThrow(() => SectionBytes.LoadFramed(Create().Section, framed, Version), name);
        for (int n = 0; n < framed.Length; n++)
        {
            IVmStateSection section = Create().Section;
            Exception? error = Caught.By(() => SectionBytes.LoadFramed(section, framed.AsSpan(0, n), section.VersionId));
            Assert.That(error, Is.InstanceOf<VmmException>(), $"{name}, {n} of {framed.Length} bytes");
        }
    });

    [Test]
    public void OldestVersionLoads()
    {
        (byte[] body, byte[] after) = OldestVersion();
        IVmStateSection section = Create().Section;
        SectionBytes.Load(section, body, section.MinimumVersionId);
        Assert.That(SectionBytes.Save(section), Is.EqualTo(after));
    }

    [Test]
    public void NewerVersionFails() => Refused(Version + 1);

    [Test]
    public void OlderThanMinimumFails() => Refused(Create().Section.MinimumVersionId - 1);

    [Test]
    public void ResetEqualsNew()
    {
        byte[] fresh = SectionBytes.Save(Create().Section);
        foreach ((string name, Action<TDevice> apply) in States())
        {
            (TDevice device, IVmStateSection section) = Create();
            apply(device);
            Reset(device);
            Assert.That(SectionBytes.Save(section), Is.EqualTo(fresh), name);
        }
    }

    [Test]
    public void LoadLeavesNothingOfTheStateBefore()
    {
        byte[] fresh = SectionBytes.Save(Create().Section);
        EachState((name, _, section) =>
        {
            SectionBytes.Load(section, fresh);
            Assert.That(SectionBytes.Save(section), Is.EqualTo(fresh), name);
        });
    }

    [Test]
    public void VmDescAccountsForEveryByte() => EachState((name, body, section) =>
        Assert.That(SectionBytes.DescribedLength(SectionBytes.Describe(section)), Is.EqualTo(body.Length), name));

    private int Version => Create().Section.VersionId;

    private void EachState(Action<string, byte[], IVmStateSection> law)
    {
        foreach ((string name, Action<TDevice> apply) in States())
        {
            (TDevice device, IVmStateSection section) = Create();
            apply(device);
            law(name, SectionBytes.Save(section), section);
        }
    }

    private void Refused(int version)
    {
        IVmStateSection section = Create().Section;
        byte[] before = SectionBytes.Save(section);
        var error = Assert.Throws<IncompatibleStateException>(() => SectionBytes.Load(section, before, version));
        Assert.That(error!.Message, Does.Contain($"'{section.Name}'").And.Contain($"version {version}"));
        Assert.That(SectionBytes.Save(section), Is.EqualTo(before), "the refused load changed nothing");
    }
}
