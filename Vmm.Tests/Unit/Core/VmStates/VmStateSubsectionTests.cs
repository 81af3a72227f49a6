using Vmm.Core.Errors;
using Vmm.Core.VmStates;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.SectionBytes;

namespace Vmm.Tests.Unit.Core.VmStates;

/// <summary>The reader finds subsections by lookahead and name prefix (stream 2.4, 17.15).</summary>
[TestFixture]
public sealed class VmStateSubsectionTests
{
    private sealed class Device
    {
        public byte A = 1, B = 2, C = 3, Deep = 4;
        public bool SendB, SendC, SendDeep;
        public Device? Inner;
        public List<string> Calls = [];
    }

    private static VmStateDescription<Device> Sub(string name, Func<Device, bool> needed, VmStateRef<Device, byte> member, params VmStateDescription<Device>[] subs) => new()
    {
        Name = name, VersionId = 2, MinimumVersionId = 1, Needed = needed, Fields = [VmState.UInt8(name[^1..], member)], Subsections = subs,
    };

    private static readonly VmStateDescription<Device> s_device = new()
    {
        Name = "dev",
        Fields = [VmState.UInt8<Device>("a", static d => ref d.A)],
        Subsections =
        [
            Sub("dev/b", static d => d.SendB, static d => ref d.B, Sub("dev/b/deep", static d => d.SendDeep, static d => ref d.Deep)),
            Sub("dev/c", static d => d.SendC, static d => ref d.C),
        ],
    };

    private const string B = "05 05 6465762f62 00000002";
    private const string C = "05 05 6465762f63 00000002";
    private const string Deep = "05 0a 6465762f622f64656570 00000002";

    [Test]
    public void SubsectionsFollowTheFieldsInOrderWhenNeeded()
    {
        Assert.That(Save(s_device, new Device()), Is.EqualTo(Hex("01")));
        Assert.That(Save(s_device, new Device { SendC = true, SendB = true }), Is.EqualTo(Hex($"01 {B} 02 {C} 03")));
        Assert.That(Save(s_device, new Device { SendB = true, SendDeep = true }), Is.EqualTo(Hex($"01 {B} 02 {Deep} 04")));
        Assert.That(Save(s_device, new Device { SendDeep = true }), Is.EqualTo(Hex("01")), "a needed subsection does not travel without its parent");
    }

    [Test]
    public void SubsectionsLoadInAnyOrderAndMayBeMissing()
    {
        var d = new Device();
        Load(s_device, d, Hex($"09 {C} 0c {B} 0b {Deep} 0d"));
        Assert.That((d.A, d.B, d.C, d.Deep), Is.EqualTo(((byte)9, (byte)11, (byte)12, (byte)13)));
        Load(s_device, d, Hex("08"));
        Assert.That((d.A, d.B), Is.EqualTo(((byte)8, (byte)11)));
    }

    [Test]
    public void AnUnknownSubsectionIsFatalAndNamed()
    {
        var error = Assert.Throws<IncompatibleStateException>(() => Load(s_device, new Device(), Hex("01 05 05 6465762f78 00000001 00")));
        Assert.That(error!.Message, Does.Contain("'dev/x'").And.Contain("'dev/b' or 'dev/c'").And.Contain("offset 1"));
    }

    [Test]
    public void ASubsectionOfAnotherNameIsLeftToTheOuterDescription()
    {
        byte[] foreign = Hex("01 05 05 6f74682f62 00000001 00");
        var f = new Vmm.Core.Wire.QemuFileReader(new Support.MemoryChannel(foreign));
        s_device.Bind(new Device()).Load(f, 1);
        Assert.That(f.Position, Is.EqualTo(1));
    }

    [Test]
    public void ANameShorterThanTheDescriptionsIsLeftToTheOuterDescription()
    {
        byte[] shorter = Hex("01 05 03 646576 00000001 00");
        var f = new Vmm.Core.Wire.QemuFileReader(new Support.MemoryChannel(shorter));
        s_device.Bind(new Device()).Load(f, 1);
        Assert.That(f.Position, Is.EqualTo(1));
    }

    /// <summary>The inner description looks for subsections first; it takes all with its prefix and leaves the others to the outer description.</summary>
    [Test]
    public void AnOuterSubsectionPassesTheNestedStructThatIsReadFirst()
    {
        VmStateDescription<Device> outer = new()
        {
            Name = "outer",
            Fields = [VmState.Struct<Device, Device>("inner", s_device, static d => d.Inner!)],
            Subsections = [Sub("outer/c", static d => d.SendC, static d => ref d.C)],
        };
        var d = new Device { SendC = true, Inner = new Device { SendB = true } };
        byte[] bytes = Save(outer, d);
        Assert.That(bytes, Is.EqualTo(Hex($"01 {B} 02 05 07 6f757465722f63 00000002 03")));
        var loaded = new Device { C = 0, Inner = new Device { B = 0 } };
        Load(outer, loaded, bytes);
        Assert.That((loaded.C, loaded.Inner!.B), Is.EqualTo(((byte)3, (byte)2)));
    }

    /// <summary>
    /// A reader compares only the prefix of a name (stream 17.15), so no reader could load these streams. Bind refuses the descriptions before anything
    /// writes a stream.
    /// </summary>
    [Test]
    public void ADescriptionThatWouldTakeAnothersSubsectionIsRefused()
    {
        VmStateDescription<Device> inner = new() { Name = "dev", Fields = [VmState.UInt8<Device>("a", static d => ref d.A)] };
        VmStateDescription<Device> sameName = new()
        {
            Name = "dev", Fields = [VmState.Struct<Device, Device>("inner", inner, static d => d.Inner!)],
            Subsections = [Sub("dev/c", static d => d.SendC, static d => ref d.C)],
        };
        Assert.That(Assert.Throws<ArgumentException>(() => sameName.Bind(new Device()))!.Message, Does.Contain("'dev/c'").And.Contain("'dev'"));
        VmStateDescription<Device> sibling = new()
        {
            Name = "dev", Subsections = [Sub("dev/c", static d => d.SendC, static d => ref d.C), Sub("dev/cc", static d => d.SendB, static d => ref d.B)],
        };
        Assert.That(Assert.Throws<ArgumentException>(() => sibling.Bind(new Device()))!.Message, Does.Contain("'dev/cc'").And.Contain("'dev/c'"));
        VmStateDescription<Device> otherOrder = new() { Name = "dev", Subsections = [sibling.Subsections[1], sibling.Subsections[0]] };
        Assert.DoesNotThrow(() => otherOrder.Bind(new Device()), "with the longer name first the order is unambiguous");
    }

    [Test]
    public void ReadersKeepEightBitsOfASubsectionsVersion()
    {
        var d = new Device();
        Load(s_device, d, Hex("01 05 05 6465762f62 ffffff02 07"));
        Assert.That(d.B, Is.EqualTo(7));
        Assert.Throws<IncompatibleStateException>(() => Load(s_device, d, Hex("01 05 05 6465762f62 00000003 07")), "version 3 is too new");
        Assert.Throws<IncompatibleStateException>(() => Load(s_device, d, Hex("01 05 05 6465762f62 00000000 07")), "version 0 is too old");
    }

    [Test]
    public void NestedSubsectionsAreBoundInDepthByTheirDeclaration()
    {
        VmStateDescription<Device> at = Sub(Name(40), static _ => true, static d => ref d.A);
        for (int i = 39; i > 0; i--) at = Sub(Name(i), static _ => true, static d => ref d.A, at);
        Assert.That(Assert.Throws<StreamLimitException>(() => Save(at, new Device()))!.Message, Does.Contain("WireLimits.VmStateDepth"));
        static string Name(int i) => new('x', i);
    }

    private static VmStateDescription<Device> Hooked(bool failFields = false, string? failHook = null)
    {
        void Call(Device d, string hook)
        {
            d.Calls.Add(hook);
            if (hook == failHook) throw new InvalidDataException($"{hook} says no");
        }
        var bad = new VmStateType<byte>("bad", 1, (_, _) => { if (failFields) throw new InvalidDataException("cannot put"); }, static (_, ref _) => { });
        return new()
        {
            Name = "dev",
            Fields = [VmState.Single("f", bad, static (Device d) => ref d.A)],
            PreSave = d => Call(d, "pre_save"), PostSave = d => Call(d, "post_save"), PreLoad = d => Call(d, "pre_load"), PostLoad = (d, v) => Call(d, $"post_load({v})"),
            Subsections =
            [
                new()
                {
                    Name = "dev/s", Needed = d => { Call(d, "needed"); return true; },
                    PreSave = d => Call(d, "s.pre_save"), PostSave = d => Call(d, "s.post_save"), PreLoad = d => Call(d, "s.pre_load"), PostLoad = (d, _) => Call(d, "s.post_load"),
                },
            ],
        };
    }

    [Test]
    public void HooksRunInQemusOrder()
    {
        var d = new Device();
        byte[] bytes = Save(Hooked(), d);
        Assert.That(d.Calls, Is.EqualTo(new[] { "pre_save", "needed", "s.pre_save", "s.post_save", "post_save" }));
        d.Calls.Clear();
        Load(Hooked(), d, bytes);
        Assert.That(d.Calls, Is.EqualTo(new[] { "pre_load", "s.pre_load", "s.post_load", "post_load(1)" }));
    }

    [TestCase(true, null, "pre_save post_save", "cannot put")]
    [TestCase(false, "pre_save", "pre_save", "pre_save says no")]
    [TestCase(false, "s.pre_save", "pre_save needed s.pre_save post_save", "s.pre_save says no")]
    [TestCase(false, "post_save", "pre_save needed s.pre_save s.post_save post_save", "post_save says no")]
    public void PostSaveRunsAfterAFailureToo(bool failFields, string? failHook, string calls, string message)
    {
        var d = new Device();
        Exception? error = Caught.By(() => Save(Hooked(failFields, failHook), d));
        Assert.That(error!.Message, Does.Contain(message));
        Assert.That(string.Join(' ', d.Calls), Is.EqualTo(calls));
    }

    [Test]
    public void ASecondFailureInPostSaveHidesNothing()
    {
        var error = Assert.Throws<DeviceStateException>(() => Save(Hooked(failFields: true, failHook: "post_save"), new Device()));
        Assert.That(error!.Message, Does.Contain("cannot put").And.Contain("post_save says no"));
    }

    [Test]
    public void AHooksFailureNamesSectionDescriptionAndHook()
    {
        byte[] bytes = Save(Hooked(), new Device());
        var error = Assert.Throws<DeviceStateException>(() => Load(Hooked(failHook: "post_load(1)"), new Device(), bytes));
        Assert.That(error!.Message, Does.Contain("section 'dev/0'").And.Contain("'dev'").And.Contain("post_load").And.Contain("says no"));
    }

    [Test]
    public void NeededAtTheTopDecidesAboutTheSection()
    {
        VmStateDescription<Device> description = new() { Name = "dev", Needed = static d => d.SendB };
        Assert.That(description.Bind(new Device()).IsNeeded(), Is.False);
        Assert.That(description.Bind(new Device { SendB = true }).IsNeeded(), Is.True);
        Assert.That(s_device.Bind(new Device()).IsNeeded(), Is.True);
    }

    [Test]
    public void FlagsReachTheSection()
    {
        var section = new VmStateDescription<Device> { Name = "dev", VersionId = 4, MinimumVersionId = 2, IsEarlySetup = true, IsUnmigratable = true }.Bind(new Device());
        Assert.That((section.Name, section.VersionId, section.MinimumVersionId, section.IsEarlySetup, section.IsMigratable), Is.EqualTo(("dev", 4, 2, true, false)));
    }

    [TestCase("other/b")]
    [TestCase("dev")]
    [TestCase("")]
    public void ASubsectionMustExtendItsParentsName(string name)
    {
        VmStateDescription<Device> description = new() { Name = "dev", Subsections = [new() { Name = name }] };
        Assert.Throws<ArgumentException>(() => description.Bind(new Device()));
    }

    [Test]
    public void AMinimumOverTheVersionIsRefused() =>
        Assert.Throws<ArgumentException>(() => new VmStateDescription<Device> { Name = "dev", VersionId = 1, MinimumVersionId = 2 }.Bind(new Device()));
}
