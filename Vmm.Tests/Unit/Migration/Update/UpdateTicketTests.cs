using Vmm.Core.Errors;
using Vmm.Migration.Channels;
using Vmm.Migration.Update;

namespace Vmm.Tests.Unit.Migration.Update;

/// <summary>The old process puts a ticket into the new one's environment, which says how the VM arrives.</summary>
[TestFixture]
public class UpdateTicketTests
{
    [Test]
    public void ATransferComesBackAsItWas()
    {
        var ticket = new UpdateTicket { Channels = new UpdateChannels(7, UpdateTicket.Unix("/a=b/main"), UpdateTicket.Unix("/c")), ReportPath = "/r" };
        Assert.That(UpdateTicket.Parse(ticket.ToText()), Is.EqualTo(ticket));
    }

    [Test]
    public void AnExecComesBackAsItWas()
    {
        var ticket = new UpdateTicket
        {
            Channels = new UpdateChannels(7, new MigrationAddress { Transport = MigrationTransport.File, Path = "/state" }, null), RemoveDirectory = "/d", StoppedAtNs = long.MaxValue,
        };
        Assert.That(UpdateTicket.Parse(ticket.ToText()), Is.EqualTo(ticket));
    }

    [TestCase("", "line ''")]
    [TestCase("pid=1\nstopped-at-ns=0", "'main' is missing")]
    [TestCase("main=/m\nstopped-at-ns=0", "'pid' must be a number")]
    [TestCase("main=/m\npid=2147483648\nstopped-at-ns=0", "found '2147483648'")]
    [TestCase("main=/m\npid=1\nstopped-at-ns=-1", "found '-1'")]
    [TestCase("main=/m\nmain=/n\npid=1\nstopped-at-ns=0", "line 'main=/n'")]
    public void WhatIsNoTicketIsRefusedAndNamed(string text, string expected) =>
        Assert.That(() => UpdateTicket.Parse(text), Throws.TypeOf<ConfigurationException>().With.Message.Contains(expected));

    [Test]
    public void APathWithALineEndIsRefused()
    {
        var ticket = new UpdateTicket { Channels = new UpdateChannels(7, UpdateTicket.Unix("/a\npid=1"), UpdateTicket.Unix("/c")) };
        Assert.That(ticket.ToText, Throws.TypeOf<ConfigurationException>().With.Message.Contains("line break"));
    }
}
